import { type FileHandle, open, stat } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import { closest, LaproxError, show, throwIfAborted } from './errors.js'
import { replaceFile } from './file.js'
import { elementBytes, packed, Tensor, type TensorType } from './tensor.js'

/**
 * The format (https://huggingface.co/docs/safetensors): 8 bytes of header length, little-endian; a JSON header
 * `{ name: { dtype, shape, data_offsets: [begin, end] }, __metadata__: { key: text } }`; the tensors' bytes, row-major and
 * little-endian, that cover the rest of the file without a gap or an overlap.
 */

/** Longest header that is read or written, in bytes: the format's own limit. */
const maxHeaderBytes = 100_000_000
/** Bytes handed to one read or write: a call that an abort waits for. */
const batchBytes = 32 * 1024 * 1024
/** Buffers handed to one read or write; systems take 1024 at most. */
const batchBuffers = 256
/** Bytes of a strided tensor that are gathered at a time, on the JS thread. */
const gatherBytes = 1024 * 1024
const metadataName = '__metadata__'

/** Bits of an element, and the tensor type where there is one. */
const dtypes: ReadonlyMap<string, { readonly bits: number; readonly type?: TensorType }> = new Map([
  ['F32', { bits: 32, type: 'float32' }],
  ['F16', { bits: 16, type: 'float16' }],
  ['BF16', { bits: 16, type: 'bfloat16' }],
  ['I32', { bits: 32, type: 'int32' }],
  ['F64', { bits: 64, type: 'float64' }],
  ['F8_E4M3', { bits: 8, type: 'float8e4m3fn' }],
  ['F8_E5M2', { bits: 8, type: 'float8e5m2' }],
  ['I8', { bits: 8, type: 'int8' }],
  ['I16', { bits: 16, type: 'int16' }],
  ['I64', { bits: 64, type: 'int64' }],
  ['U8', { bits: 8, type: 'uint8' }],
  ['U16', { bits: 16, type: 'uint16' }],
  ['U32', { bits: 32, type: 'uint32' }],
  ['U64', { bits: 64, type: 'uint64' }],
  ['BOOL', { bits: 8, type: 'bool' }],
  ['F4', { bits: 4 }],
  ['F6_E2M3', { bits: 6 }],
  ['F6_E3M2', { bits: 6 }],
  ['F8_E8M0', { bits: 8 }],
  ['F8_E4M3FNUZ', { bits: 8 }],
  ['F8_E5M2FNUZ', { bits: 8 }],
  ['C64', { bits: 64 }],
])
const dtypeOf: ReadonlyMap<TensorType, string> = new Map(
  Array.from(dtypes).flatMap(([dtype, { type }]) => (type === undefined ? [] : [[type, dtype] as const])),
)

/** What a safetensors file holds. */
export interface SafetensorsFile {
  /** The tensors by name, in the order of their bytes. */
  readonly tensors: ReadonlyMap<string, Tensor>
  /** The file's `__metadata__`; empty where it has none. */
  readonly metadata: Readonly<Record<string, string>>
}

/** What {@link readSafetensors} takes. */
export interface ReadSafetensorsOptions {
  /** The tensors to read; only their bytes are. Default: all. */
  readonly names?: readonly string[] | undefined
  /** Ends the reading; it rejects with `ABORTED`. */
  readonly signal?: AbortSignal | undefined
}

/** What {@link writeSafetensors} takes. */
export interface WriteSafetensorsOptions {
  /** Ends the writing; it rejects with `ABORTED`, and the file is as it was. */
  readonly signal?: AbortSignal | undefined
}

/** A tensor as the header has it. Offsets count from the end of the header. */
export interface SafetensorsEntry {
  readonly name: string
  readonly dtype: string
  /** Absent for dtypes that no {@link Tensor} has. */
  readonly type: TensorType | undefined
  readonly dims: readonly number[]
  readonly begin: number
  readonly end: number
}

/**
 * Reads a safetensors file, of any size, on the file system's threads. The whole header is checked against the file first.
 *
 * Each tensor's bytes are read straight into a buffer of its own: nothing is copied, every element is aligned whatever its
 * offset in the file is, and each tensor is freed or transferred by itself. F16 and BF16 come as `Uint16Array`, I64 as
 * `BigInt64Array`, BOOL and the 8-bit floats as `Uint8Array`.
 *
 * @param path of the file
 * @throws LaproxError (as a rejection)
 *   `BAD_FILE` for a file that is truncated, lies in its header or is no safetensors at all: names the file and the tensor,
 *   `IO` for one that is missing or cannot be read, with the system's error as `cause`,
 *   `INVALID_ARGUMENT` for a name that the file does not have,
 *   `UNSUPPORTED` for tensors of a dtype that has no {@link TensorType} (leave them out by `names`),
 *   `OUT_OF_MEMORY`, `ABORTED`
 */
export async function readSafetensors(path: string | URL, options: ReadSafetensorsOptions = {}): Promise<SafetensorsFile> {
  const { names, signal } = options
  const file = fileName(path)
  if (names !== undefined && !Array.isArray(names)) {
    throw new LaproxError('INVALID_ARGUMENT', `names is ${show(names)}; expected an array of tensor names`)
  }
  throwIfAborted(signal)
  return withFile(file, async (handle, bytes) => {
    const { entries, metadata, dataBegin } = await readHeader(handle, bytes, file)
    const wanted = names === undefined ? entries : choose(entries, names, file)
    const tensors = new Map<string, Tensor>()
    let batch: Uint8Array[] = []
    let begin = 0 // of the batch, in the file
    let end = 0
    for (const entry of wanted) {
      const tensor = allocate(entry, file)
      tensors.set(entry.name, tensor)
      const { data } = tensor
      for (let done = 0; done < data.byteLength; done += batchBytes) {
        const part = new Uint8Array(data.buffer, data.byteOffset + done, Math.min(batchBytes, data.byteLength - done))
        const at = dataBegin + entry.begin + done
        if (at !== end || end - begin + part.length > batchBytes || batch.length === batchBuffers) {
          throwIfAborted(signal)
          await fill(handle, batch, begin, file)
          batch = []
          begin = at
        }
        batch.push(part)
        end = at + part.length
      }
    }
    throwIfAborted(signal)
    await fill(handle, batch, begin, file)
    return { tensors, metadata }
  })
}

/** What a safetensors file says that it holds, checked, without a byte of its tensors; rejects as {@link readSafetensors} does. */
export async function readSafetensorsHeader(path: string | URL): Promise<SafetensorsHeader> {
  const file = fileName(path)
  return withFile(file, (handle, bytes) => readHeader(handle, bytes, file))
}

/** A file's tensors in the order of their bytes, its metadata, and where the tensors' bytes begin. */
export interface SafetensorsHeader {
  readonly entries: readonly SafetensorsEntry[]
  readonly metadata: Readonly<Record<string, string>>
  readonly dataBegin: number
}

async function readHeader(handle: FileHandle, fileBytes: number, file: string): Promise<SafetensorsHeader> {
  const prefix = new Uint8Array(8)
  if (fileBytes < 8) throw noSafetensors(file, `it has ${fileBytes} bytes; expected at least the 8 of a header length`)
  await fill(handle, [prefix], 0, file)
  const headerBytes = checkHeaderLength(prefix, fileBytes, file)
  const header = new Uint8Array(headerBytes)
  await fill(handle, [header], 8, file)
  const dataBegin = 8 + headerBytes
  return { ...parseHeader(header, fileBytes - dataBegin, file), dataBegin }
}

/**
 * Writes a safetensors file, on the file system's threads. The bytes go to a temporary file in the same folder, which is
 * flushed and then renamed: whatever goes wrong, `path` holds either what it held before or the whole new file.
 *
 * Tensors are ordered by the size of their elements, largest first, and then by name, and the header is padded to a multiple
 * of 8 bytes, as the format's reference implementation does: each tensor lies aligned in the file, and the same tensors give
 * the same bytes. Strided tensors are gathered piece by piece. Do not write to the tensors meanwhile.
 *
 * @param path of the file, which is replaced where it exists
 * @param tensors by name
 * @param metadata texts for the header's `__metadata__`
 * @throws LaproxError (as a rejection) `INVALID_ARGUMENT` for a name or metadata that the format does not allow, `IO` with the
 *   system's error as `cause`, `DISPOSED`, `DETACHED`, `ABORTED`
 */
export async function writeSafetensors(
  path: string | URL,
  tensors: ReadonlyMap<string, Tensor> | Readonly<Record<string, Tensor>>,
  metadata: Readonly<Record<string, string>> = {},
  options: WriteSafetensorsOptions = {},
): Promise<void> {
  const { signal } = options
  const file = fileName(path)
  throwIfAborted(signal)
  const sorted = sortTensors(tensors)
  const header = makeHeader(sorted, metadata)
  await replaceFile(file, (temporary) => writeTensors(temporary, header, sorted, signal), { signal })
}

async function writeTensors(file: string, header: Uint8Array, tensors: readonly Named[], signal: AbortSignal | undefined): Promise<void> {
  const handle = await open(file, 'wx')
  try {
    let batch: Uint8Array[] = [header]
    let bytes = header.length
    for (const [, tensor] of tensors) {
      // Gathering keeps the JS thread busy: a little at a time.
      const most = tensor.contiguous ? batchBytes : gatherBytes
      for (const piece of pieces(tensor)) {
        if (bytes + piece.length > most || batch.length === batchBuffers) {
          await drain(handle, batch)
          throwIfAborted(signal)
          batch = []
          bytes = 0
        }
        batch.push(piece)
        bytes += piece.length
      }
    }
    await drain(handle, batch)
    for (const [, tensor] of tensors) void tensor.data // throws where it was detached while it was written
  } finally {
    await handle.close()
  }
}

/** The length in the first 8 bytes of a file of so many bytes, checked. */
function checkHeaderLength(prefix: Uint8Array, fileBytes: number, file: string): number {
  const length = new DataView(prefix.buffer, prefix.byteOffset, 8).getBigUint64(0, true)
  if (length > BigInt(maxHeaderBytes)) {
    throw noSafetensors(file, `its first 8 bytes give a header of ${length} bytes; expected at most ${maxHeaderBytes}`)
  }
  if (Number(length) > fileBytes - 8) {
    throw badFile(file, `it is truncated: its header takes ${length} bytes, and only ${fileBytes - 8} follow the length`)
  }
  return Number(length)
}

/**
 * The entries of a header, in the order of their bytes, and the metadata; all checked against each other and against the bytes
 * that follow the header.
 *
 * @throws LaproxError `BAD_FILE`
 */
export function parseHeader(header: Uint8Array, dataBytes: number, file: string): { entries: SafetensorsEntry[]; metadata: Record<string, string> } {
  if (header[0] !== 0x7b) throw noSafetensors(file, 'its header does not begin with {')
  let text: string
  let json: unknown
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(header)
    json = JSON.parse(text)
  } catch (cause) {
    throw noSafetensors(file, `its header is no JSON: ${(cause as Error).message}`, cause)
  }
  const twice = repeatedKey(text)
  if (twice !== undefined) throw badFile(file, `its header has ${show(twice)} twice`)
  // Begins with { and is JSON: an object.
  const { [metadataName]: rawMetadata, ...rawEntries } = json as Record<string, unknown>
  const metadata = checkMetadata(rawMetadata, file)
  const entries = Object.entries(rawEntries).map(([name, raw]) => checkEntry(name, raw, file))
  entries.sort((a, b) => a.begin - b.begin || a.end - b.end)
  let end = 0
  let before = ''
  for (const entry of entries) {
    if (entry.begin < end) {
      throw badTensor(file, entry.name, `begins at byte ${entry.begin}, inside of tensor ${show(before)}, which ends at ${end}`)
    }
    if (entry.begin > end) throw badTensor(file, entry.name, `begins at byte ${entry.begin}; bytes ${end} to ${entry.begin} belong to no tensor`)
    end = entry.end
    before = entry.name
    if (end > dataBytes) throw badTensor(file, entry.name, `ends at byte ${end}, but the file is truncated: it has ${dataBytes} bytes of data`)
  }
  if (end < dataBytes) throw badFile(file, `${dataBytes - end} bytes after the last tensor belong to none`)
  return { entries, metadata }
}

function checkEntry(name: string, raw: unknown, file: string): SafetensorsEntry {
  if (!isObject(raw)) throw badTensor(file, name, `is ${show(raw)}; expected an object`)
  for (const key of Object.keys(raw)) {
    if (key !== 'dtype' && key !== 'shape' && key !== 'data_offsets') throw badTensor(file, name, `has an unknown field ${show(key)}`)
  }
  const { dtype, shape, data_offsets: offsets } = raw
  const kind = typeof dtype === 'string' ? dtypes.get(dtype) : undefined
  if (kind === undefined) throw badTensor(file, name, `has dtype ${show(dtype)}; expected one of ${[...dtypes.keys()].join(', ')}`)
  if (!isCounts(shape)) throw badTensor(file, name, `has shape ${show(shape)}; expected an array of integers of at least 0`)
  if (!isCounts(offsets) || offsets.length !== 2 || offsets[1]! < offsets[0]!) {
    throw badTensor(file, name, `has data_offsets ${show(offsets)}; expected [begin, end] with integers 0 <= begin <= end`)
  }
  const [begin, end] = offsets as [number, number]
  const product = shape.reduce((elements, dim) => elements * (dim || 1), 1)
  if (product > Number.MAX_SAFE_INTEGER) throw badTensor(file, name, `has shape ${show(shape)}, which is too large to be`)
  const bytes = shape.includes(0) ? 0 : (product * kind.bits) / 8
  if (bytes !== end - begin) throw badTensor(file, name, `has ${end - begin} bytes; ${dtype} ${show(shape)} takes ${bytes}`)
  return { name, dtype: dtype as string, type: kind.type, dims: shape, begin, end }
}

function checkMetadata(raw: unknown, file: string): Record<string, string> {
  if (raw === undefined) return {}
  if (!isObject(raw)) throw badFile(file, `its ${metadataName} is ${show(raw)}; expected an object`)
  for (const [key, value] of Object.entries(raw)) {
    if (typeof value !== 'string') throw badFile(file, `its ${metadataName} has ${show(value)} at ${show(key)}; expected a string`)
  }
  return raw as Record<string, string>
}

/** The first key that an object of a valid JSON text has twice: JSON.parse silently takes the last. */
function repeatedKey(json: string): string | undefined {
  const open: Set<string>[] = []
  for (let i = 0; i < json.length; i++) {
    const char = json[i]
    if (char === '{') open.push(new Set())
    else if (char === '}') open.pop()
    else if (char === '"') {
      const begin = i++
      while (json[i] !== '"') i += json[i] === '\\' ? 2 : 1
      let next = i + 1
      while (json[next] === ' ' || json[next] === '\n' || json[next] === '\t' || json[next] === '\r') next++
      if (json[next] !== ':') continue // a value
      const key: string = JSON.parse(json.slice(begin, i + 1))
      const keys = open.at(-1)
      if (keys?.has(key)) return key
      keys?.add(key)
    }
  }
  return undefined
}

/** The entries of these names, in the order of their bytes. */
function choose(entries: readonly SafetensorsEntry[], names: readonly string[], file: string): SafetensorsEntry[] {
  const wanted = new Set(names)
  const chosen = entries.filter((entry) => wanted.delete(entry.name))
  for (const name of wanted) {
    const near = closest(
      name,
      entries.map((entry) => entry.name),
    )
    throw new LaproxError('INVALID_ARGUMENT', `${file} has no tensor ${show(name)}${near === undefined ? '' : `; did you mean '${near}'?`}`)
  }
  return chosen
}

function allocate(entry: SafetensorsEntry, file: string): Tensor {
  if (entry.type === undefined) {
    throw new LaproxError(
      'UNSUPPORTED',
      `${file}: tensor ${show(entry.name)} has dtype ${entry.dtype}, which has no tensor type here; leave it out by naming the tensors to read`,
    )
  }
  try {
    return Tensor.zeros(entry.type, entry.dims)
  } catch (cause) {
    throw new LaproxError(
      'OUT_OF_MEMORY',
      `${file}: tensor ${show(entry.name)} takes ${entry.end - entry.begin} bytes, which could not be allocated`,
      { cause },
    )
  }
}

type Named = readonly [name: string, tensor: Tensor]

/** Largest elements first, so that all lie aligned, then by name. */
function sortTensors(tensors: ReadonlyMap<string, Tensor> | Readonly<Record<string, Tensor>>): Named[] {
  if (!isObject(tensors)) throw new LaproxError('INVALID_ARGUMENT', `tensors is ${show(tensors)}; expected a Map or an object`)
  const named: Named[] = tensors instanceof Map ? [...tensors] : Object.entries(tensors)
  for (const [name, tensor] of named) {
    checkText(name, 'a tensor name')
    if (name === metadataName) throw new LaproxError('INVALID_ARGUMENT', `no tensor can be named '${metadataName}'`)
    if (!(tensor instanceof Tensor)) throw new LaproxError('INVALID_ARGUMENT', `tensors[${show(name)}] is ${show(tensor)}; expected a Tensor`)
    void tensor.data // throws where it is disposed of or detached
  }
  return named.sort(([a, x], [b, y]) => elementBytes(y.type) - elementBytes(x.type) || (a < b ? -1 : 1))
}

/** The length, the JSON and its padding. */
function makeHeader(tensors: readonly Named[], metadata: Readonly<Record<string, string>>): Uint8Array {
  if (!isObject(metadata)) throw new LaproxError('INVALID_ARGUMENT', `metadata is ${show(metadata)}; expected an object of strings`)
  const texts = Object.entries(metadata)
  for (const [key, value] of texts) {
    checkText(key, 'a key of metadata')
    checkText(value, `metadata[${show(key)}]`)
  }
  const entries: [string, unknown][] = texts.length === 0 ? [] : [[metadataName, metadata]]
  let end = 0
  for (const [name, { type, dims, size }] of tensors) {
    const begin = end
    end += size * elementBytes(type)
    entries.push([name, { dtype: dtypeOf.get(type), shape: dims, data_offsets: [begin, end] }])
  }
  const json = new TextEncoder().encode(JSON.stringify(Object.fromEntries(entries)))
  const length = Math.ceil(json.length / 8) * 8
  if (length > maxHeaderBytes) {
    throw new LaproxError('INVALID_ARGUMENT', `names and metadata make a header of ${length} bytes; the format takes at most ${maxHeaderBytes}`)
  }
  const header = new Uint8Array(8 + length).fill(0x20)
  new DataView(header.buffer).setBigUint64(0, BigInt(length), true)
  header.set(json, 8)
  return header
}

/** The bytes of a tensor in row-major order, at most `batchBytes` at a time. */
function* pieces(tensor: Tensor): Generator<Uint8Array> {
  const bytes = tensor.size * elementBytes(tensor.type)
  if (tensor.contiguous || bytes <= gatherBytes) {
    const { buffer, byteOffset } = packed(tensor)
    for (let done = 0; done < bytes; done += batchBytes) {
      yield new Uint8Array(buffer, byteOffset + done, Math.min(batchBytes, bytes - done))
    }
    return
  }
  const count = tensor.dims[0]!
  const rows = Math.floor((gatherBytes * count) / bytes)
  if (rows === 0) for (let i = 0; i < count; i++) yield* pieces(tensor.at(i))
  else for (let i = 0; i < count; i += rows) yield* pieces(tensor.subarray(i, Math.min(i + rows, count)))
}

/** Opens a file to read, with its size. */
async function withFile<R>(file: string, work: (handle: FileHandle, bytes: number) => Promise<R>): Promise<R> {
  let handle: FileHandle | undefined
  try {
    // Opening a pipe would wait for its writer.
    if (!(await stat(file)).isFile()) throw new LaproxError('IO', `${file} could not be read: it is no regular file`)
    handle = await open(file, 'r')
    const { size } = await handle.stat()
    return await work(handle, size)
  } catch (error) {
    if (error instanceof LaproxError) throw error
    throw new LaproxError('IO', `${file} could not be read: ${reason(error)}`, { cause: error })
  } finally {
    await handle?.close().catch(() => {})
  }
}

/** Fills the buffers, one after the other, from a position of the file. */
async function fill(handle: FileHandle, buffers: readonly Uint8Array[], position: number, file: string): Promise<void> {
  let at = position
  let left = after(buffers, 0)
  while (left.length > 0) {
    const { bytesRead } = await handle.readv(left, at)
    if (bytesRead === 0) throw badFile(file, `it is truncated: it ends at byte ${at}, and was longer a moment ago`)
    at += bytesRead
    left = after(left, bytesRead)
  }
}

/** Appends the buffers. */
async function drain(handle: FileHandle, buffers: readonly Uint8Array[]): Promise<void> {
  let left = after(buffers, 0)
  while (left.length > 0) {
    const { bytesWritten } = await handle.writev(left)
    left = after(left, bytesWritten)
  }
}

/** What is left of buffers after so many bytes. */
function after(buffers: readonly Uint8Array[], bytes: number): Uint8Array[] {
  let skip = bytes
  const left: Uint8Array[] = []
  for (const buffer of buffers) {
    if (skip < buffer.length) left.push(buffer.subarray(skip))
    skip = Math.max(0, skip - buffer.length)
  }
  return left
}

function fileName(path: unknown): string {
  if (typeof path === 'string') return path
  if (path instanceof URL && path.protocol === 'file:') return fileURLToPath(path)
  throw new LaproxError('INVALID_ARGUMENT', `path is ${path instanceof URL ? path.href : show(path)}; expected a string or a file: URL`)
}

/** JSON can write a lone surrogate, but UTF-8 cannot. */
function checkText(value: unknown, at: string): void {
  if (typeof value !== 'string' || /\p{Surrogate}/u.test(value)) {
    throw new LaproxError('INVALID_ARGUMENT', `${at} is ${show(value)}; expected a well-formed string`)
  }
}

function isObject(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function isCounts(value: unknown): value is readonly number[] {
  return Array.isArray(value) && value.every((item) => Number.isSafeInteger(item) && item >= 0 && !Object.is(item, -0))
}

function reason(error: unknown): string {
  return error instanceof Error ? error.message : show(error)
}

function badFile(file: string, what: string): LaproxError {
  return new LaproxError('BAD_FILE', `${file}: ${what}`)
}

function badTensor(file: string, name: string, what: string): LaproxError {
  return badFile(file, `tensor ${show(name)} ${what}`)
}

function noSafetensors(file: string, what: string, cause?: unknown): LaproxError {
  return new LaproxError('BAD_FILE', `${file} is no safetensors file: ${what}`, cause === undefined ? undefined : { cause })
}
