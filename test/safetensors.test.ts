import { execFileSync } from 'node:child_process'
import { type FileHandle, mkdir, mkdtemp, open, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import fc from 'fast-check'
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest'
import { LaproxError, type LaproxErrorCode } from '../lib/errors.js'
import { parseHeader, readSafetensors, writeSafetensors } from '../lib/safetensors.js'
import { elementBytes, packed, Tensor, type TensorType, tensorTypes } from '../lib/tensor.js'

let folder: string
let path: string

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'laprox-safetensors-'))
  path = join(folder, 'file.safetensors')
})
afterAll(async () => {
  await rm(folder, { recursive: true })
})
afterEach(async () => {
  vi.restoreAllMocks()
  expect((await readdir(folder)).filter((name) => name.endsWith('.tmp'))).toEqual([])
})

async function expectFailure(promise: Promise<unknown>, code: LaproxErrorCode, ...parts: string[]): Promise<LaproxError> {
  const error = await promise.then(
    () => undefined,
    (thrown: unknown) => thrown,
  )
  expect(error).toBeInstanceOf(LaproxError)
  expect(error).toMatchObject({ code })
  for (const part of parts) expect((error as LaproxError).message).toContain(part)
  return error as LaproxError
}

/** A file from a header and data, without any check. */
function encode(header: unknown, data: Uint8Array | number): Uint8Array {
  const json = new TextEncoder().encode(typeof header === 'string' ? header : JSON.stringify(header))
  const bytes = typeof data === 'number' ? new Uint8Array(data) : data
  const file = new Uint8Array(8 + json.length + bytes.length)
  new DataView(file.buffer).setBigUint64(0, BigInt(json.length), true)
  file.set(json, 8)
  file.set(bytes, 8 + json.length)
  return file
}

/** The elements as bytes, for comparison. */
function bytesOf(tensor: Tensor): Buffer {
  const data = packed(tensor)
  return Buffer.from(data.buffer, data.byteOffset, data.byteLength)
}

/** A tensor of some type whose bytes count up. */
function counting(type: TensorType, dims: readonly number[]): Tensor {
  const tensor = Tensor.zeros(type, dims)
  const bytes = new Uint8Array(tensor.data.buffer, tensor.data.byteOffset, tensor.data.byteLength)
  for (let i = 0; i < bytes.length; i++) bytes[i] = i * 7 + 1
  return tensor
}

/** The prototype of all file handles, to make the file system fail. */
async function handlePrototype(): Promise<FileHandle> {
  const handle = await open(folder, 'r')
  await handle.close()
  return Object.getPrototypeOf(handle)
}

describe('round trips', () => {
  it('keeps every type, shape, name and text', async () => {
    const tensors = new Map<string, Tensor>()
    for (const [i, type] of tensorTypes.entries()) {
      tensors.set(`layer.${i}.${type}`, counting(type, [3, i % 3, 5]))
      tensors.set(`${type} scalar`, counting(type, []))
    }
    for (const name of ['', '__proto__', 'constructor', '7', 'ключ \u{1f511} "\\\n', ' ']) tensors.set(name, counting('uint8', [3]))
    const metadata = { format: 'pt', '': '', ['__proto__']: 'x', ключ: '\u{1f511}\n' }
    await writeSafetensors(path, tensors, metadata)
    const file = await readSafetensors(path)
    expect(file.metadata).toEqual(metadata)
    expect([...file.tensors.keys()].sort()).toEqual([...tensors.keys()].sort())
    for (const [name, tensor] of tensors) {
      const read = file.tensors.get(name)!
      expect(read).toMatchObject({ type: tensor.type, dims: tensor.dims, offset: 0 })
      expect(bytesOf(read).equals(bytesOf(tensor)), name).toBe(true)
    }
    // The same tensors give the same bytes, in whatever order they come.
    const bytes = await readFile(path)
    await writeSafetensors(pathToFileURL(path), new Map([...tensors].reverse()), metadata)
    expect((await readFile(path)).equals(bytes)).toBe(true)
  })

  it('takes a plain object, or nothing at all', async () => {
    await writeSafetensors(path, { a: counting('float32', [2]) })
    expect([...(await readSafetensors(pathToFileURL(path))).tensors.keys()]).toEqual(['a'])
    await writeSafetensors(path, {})
    expect(await readSafetensors(path)).toEqual({ tensors: new Map(), metadata: {} })
    expect((await readFile(path)).toString('latin1')).toBe('\b\0\0\0\0\0\0\0{}      ')
  })

  it('writes an aligned, documented layout', async () => {
    await writeSafetensors(path, {
      z: counting('int64', [1]),
      b: counting('uint8', [3]),
      a: counting('uint8', [1]),
      h: counting('float16', [3]),
    })
    const bytes = await readFile(path)
    const header = JSON.parse(bytes.toString('utf8', 8, 8 + Number(bytes.readBigUInt64LE())))
    expect(bytes.readBigUInt64LE() % 8n).toBe(0n)
    expect(header).toEqual({
      z: { dtype: 'I64', shape: [1], data_offsets: [0, 8] },
      h: { dtype: 'F16', shape: [3], data_offsets: [8, 14] },
      a: { dtype: 'U8', shape: [1], data_offsets: [14, 15] },
      b: { dtype: 'U8', shape: [3], data_offsets: [15, 18] },
    })
    expect(bytes.length).toBe(8 + Number(bytes.readBigUInt64LE()) + 18)
  })

  it('reads elements at odd offsets', async () => {
    const header = { a: { dtype: 'U8', shape: [1], data_offsets: [0, 1] }, b: { dtype: 'F32', shape: [2], data_offsets: [1, 9] } }
    const data = new Uint8Array(9)
    new DataView(data.buffer).setFloat32(1, 1.5, true)
    new DataView(data.buffer).setFloat32(5, -2, true)
    await writeFile(path, encode(`${JSON.stringify(header)} `, data))
    const { tensors } = await readSafetensors(path)
    expect(Array.from(tensors.get('b')!.data as Float32Array)).toEqual([1.5, -2])
  })

  it('reads tensors by name only, in the order of their bytes', async () => {
    await writeSafetensors(path, { a: counting('uint8', [5]), b: counting('uint8', [6]), c: counting('uint8', [7]) })
    const { tensors } = await readSafetensors(path, { names: ['c', 'a', 'c'] })
    expect([...tensors.keys()]).toEqual(['a', 'c'])
    expect(bytesOf(tensors.get('c')!).equals(bytesOf(counting('uint8', [7])))).toBe(true)
    expect((await readSafetensors(path, { names: [] })).tensors.size).toBe(0)
    await expectFailure(readSafetensors(path, { names: ['a', 'bb'] }), 'INVALID_ARGUMENT', path, "no tensor 'bb'; did you mean 'b'?")
    await expectFailure(readSafetensors(path, { names: ['xyz'] }), 'INVALID_ARGUMENT', "no tensor 'xyz'")
    await expectFailure(readSafetensors(path, { names: 'a' as never }), 'INVALID_ARGUMENT', "names is 'a'")
  })

  it('writes strided tensors, large ones in pieces', async () => {
    const data = Uint16Array.from({ length: 3 * 700_000 }, (_, i) => i)
    const tensors = {
      transposed: new Tensor('bfloat16', data, [700_000, 3], { strides: [1, 700_000] }),
      wide: new Tensor('bfloat16', data, [3, 600_000], { strides: [700_000, 1], offset: 5 }),
      every: new Tensor('bfloat16', data, [2, 600_000], { strides: [3, 3] }),
      small: new Tensor('bfloat16', data, [2, 2], { strides: [1, 2] }),
      empty: new Tensor('bfloat16', data, [0, 2], { strides: [1, 1], offset: 9 }),
    }
    await writeSafetensors(path, tensors)
    const read = await readSafetensors(path)
    for (const [name, tensor] of Object.entries(tensors)) {
      expect(read.tensors.get(name)!.dims).toEqual(tensor.dims)
      expect(bytesOf(read.tensors.get(name)!).equals(bytesOf(tensor)), name).toBe(true)
    }
  })

  it('goes on after short reads and writes, and over many tensors', async () => {
    const prototype = await handlePrototype()
    const { readv, writev } = prototype
    let calls = 0
    // A part of the first buffer now and then; as the system may do at any time.
    const some = (buffers: readonly NodeJS.ArrayBufferView[]): Uint8Array[] => {
      const [first, ...more] = buffers as Uint8Array[]
      return ++calls % 3 === 0 ? [first!, ...more] : [first!.subarray(0, Math.ceil(first!.length / 2))]
    }
    vi.spyOn(prototype, 'readv').mockImplementation(function (this: FileHandle, buffers, position) {
      return readv.call(this, some(buffers), position) as never
    })
    vi.spyOn(prototype, 'writev').mockImplementation(function (this: FileHandle, buffers, position) {
      return writev.call(this, some(buffers), position) as never
    })
    const tensors = new Map(Array.from({ length: 600 }, (_, i) => [`t${i}`, counting('uint8', [i % 7])] as const))
    await writeSafetensors(path, tensors)
    const read = await readSafetensors(path)
    expect(calls).toBeGreaterThan(20)
    for (const [name, tensor] of tensors) expect(bytesOf(read.tensors.get(name)!).equals(bytesOf(tensor)), name).toBe(true)
  })

  it('round trips anything, by property', async () => {
    const tensors = fc.dictionary(
      fc.string({ unit: 'grapheme' }).filter((name) => name !== '__metadata__'),
      fc.record({ type: fc.constantFrom(...tensorTypes), dims: fc.array(fc.nat(4), { maxLength: 4 }) }),
      { maxKeys: 6 },
    )
    await fc.assert(
      fc.asyncProperty(
        tensors,
        fc.dictionary(fc.string({ unit: 'grapheme' }), fc.string({ unit: 'grapheme' }), { maxKeys: 3 }),
        async (shapes, metadata) => {
          const written = new Map(Object.entries(shapes).map(([name, { type, dims }]) => [name, counting(type, dims)]))
          await writeSafetensors(path, written, metadata)
          const read = await readSafetensors(path)
          expect(read.metadata).toEqual({ ...metadata })
          expect(read.tensors.size).toBe(written.size)
          for (const [name, tensor] of written) {
            expect(read.tensors.get(name)).toMatchObject({ type: tensor.type, dims: tensor.dims })
            expect(bytesOf(read.tensors.get(name)!).equals(bytesOf(tensor))).toBe(true)
          }
        },
      ),
      { seed: 3, numRuns: 100 },
    )
  })
})

describe('bad files', () => {
  const f32 = { dtype: 'F32', shape: [2], data_offsets: [0, 8] }
  const second = { dtype: 'F32', shape: [2], data_offsets: [8, 16] }

  it.each<[what: string, bytes: Uint8Array, ...parts: string[]]>([
    ['an empty file', new Uint8Array(0), 'is no safetensors file', 'it has 0 bytes'],
    ['seven bytes', new Uint8Array(7), 'it has 7 bytes'],
    ['a text file', new TextEncoder().encode('{"model": "a JSON file"}'), 'is no safetensors file', 'expected at most 100000000'],
    ['a header of no bytes', new Uint8Array(8), 'is no safetensors file', 'does not begin with {'],
    ['a header beyond the file', encode({ a: f32 }, 8).subarray(0, 20), 'it is truncated: its header takes'],
    ['a long header', Uint8Array.of(1, 0xe1, 0xf5, 5, 0, 0, 0, 0), 'a header of 100000001 bytes; expected at most 100000000'],
    ['a longer header', new Uint8Array(8).fill(255), 'a header of 18446744073709551615 bytes'],
    ['an array', encode([], 0), 'does not begin with {'],
    ['a header after a space', encode(` ${JSON.stringify({ a: f32 })}`, 8), 'does not begin with {'],
    ['half a header', encode('{"a":', 0), 'its header is no JSON'],
    ['a header that is no UTF-8', encode('{"a":1}', 0).map((byte) => (byte === 0x61 ? 0xff : byte)), 'its header is no JSON'],
    ['a name twice', encode(`{"a":${JSON.stringify(f32)},"\\u0061" : ${JSON.stringify(second)}}`, 16), "its header has 'a' twice"],
    ['a dtype twice', encode('{"a":{"dtype":"F32","shape":[2],"dtype":"F32","data_offsets":[0,8]}}', 8), "has 'dtype' twice"],
    ['metadata twice', encode('{"__metadata__":{},"__metadata__":{}}', 0), "has '__metadata__' twice"],
    ['a text in metadata twice', encode('{"__metadata__":{"a":"1","b":"{\\"","a":"2"}}', 0), "has 'a' twice"],
    ['metadata of numbers', encode({ __metadata__: { a: 1 } }, 0), "__metadata__ has 1 at 'a'; expected a string"],
    ['metadata as a list', encode({ __metadata__: [] }, 0), '__metadata__ is []'],
    ['metadata of null', encode({ __metadata__: null }, 0), '__metadata__ is null'],
    ['an entry of text', encode({ a: 'F32' }, 0), "tensor 'a' is 'F32'; expected an object"],
    ['an entry of null', encode({ a: null }, 0), "tensor 'a' is null"],
    ['an unknown field', encode({ a: { ...f32, stride: 1 } }, 8), "tensor 'a' has an unknown field 'stride'"],
    ['no dtype', encode({ a: { shape: [2], data_offsets: [0, 8] } }, 8), "tensor 'a' has dtype undefined; expected one of F32"],
    ['an unknown dtype', encode({ a: { ...f32, dtype: 'f32' } }, 8), "tensor 'a' has dtype 'f32'"],
    ['no shape', encode({ a: { dtype: 'F32', data_offsets: [0, 8] } }, 8), "tensor 'a' has shape undefined"],
    ['a negative shape', encode({ a: { ...f32, shape: [-2] } }, 8), 'has shape [-2]'],
    ['a shape of -0', encode('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0), 'has shape'],
    ['a fractional shape', encode({ a: { ...f32, shape: [2.5] } }, 8), 'has shape [2.5]'],
    ['an infinite shape', encode('{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', 8), 'has shape [Infinity]'],
    ['a huge shape', encode({ a: { ...f32, shape: [2 ** 52, 2 ** 52] } }, 8), 'too large to be'],
    ['a huge shape of nothing', encode({ a: { dtype: 'F32', shape: [2 ** 52, 0, 2 ** 52], data_offsets: [0, 0] } }, 0), 'too large to be'],
    ['no offsets', encode({ a: { dtype: 'F32', shape: [2] } }, 8), 'has data_offsets undefined'],
    ['one offset', encode({ a: { ...f32, data_offsets: [8] } }, 8), 'has data_offsets [8]'],
    ['reversed offsets', encode({ a: { ...f32, data_offsets: [8, 0] } }, 8), 'has data_offsets [8, 0]'],
    ['negative offsets', encode({ a: { ...f32, data_offsets: [-8, 0] } }, 8), 'has data_offsets [-8, 0]'],
    ['a shape that does not fit', encode({ a: { ...f32, shape: [3] } }, 8), "tensor 'a' has 8 bytes; F32 [3] takes 12"],
    ['half a byte', encode({ a: { dtype: 'F4', shape: [3], data_offsets: [0, 2] } }, 2), 'F4 [3] takes 1.5'],
    [
      'an overlap',
      encode({ a: f32, b: { ...second, data_offsets: [4, 12] } }, 12),
      "tensor 'b' begins at byte 4, inside of tensor 'a', which ends at 8",
    ],
    ['the same bytes twice', encode({ a: f32, b: f32 }, 8), "tensor 'b' begins at byte 0, inside of tensor 'a'"],
    ['a hole', encode({ a: f32, b: { ...second, data_offsets: [12, 20] } }, 20), "tensor 'b' begins at byte 12; bytes 8 to 12 belong to no tensor"],
    ['a hole at the beginning', encode({ b: second }, 16), 'bytes 0 to 8 belong to no tensor'],
    ['truncated data', encode({ a: f32, b: second }, 15), "tensor 'b' ends at byte 16, but the file is truncated: it has 15 bytes of data"],
    ['trailing bytes', encode({ a: f32, b: second }, 17), '1 bytes after the last tensor belong to none'],
    ['trailing bytes alone', encode({}, 3), '3 bytes after the last tensor'],
  ])('refuses %s', async (_what, bytes, ...parts) => {
    await writeFile(path, bytes)
    await expectFailure(readSafetensors(path), 'BAD_FILE', path, ...parts)
  })

  it('refuses deep or endless JSON in short', async () => {
    for (const value of ['['.repeat(200_000) + ']'.repeat(200_000), `"${'\\"'.repeat(300_000)}"`, `{"a":[${'7,'.repeat(100_000)}7]}`]) {
      await writeFile(path, encode(`{"a":${value}}`, 0))
      const error = await expectFailure(readSafetensors(path), 'BAD_FILE', path)
      expect(error.message.length).toBeLessThan(path.length + 500)
    }
  })

  it('reads what it can of dtypes that have no tensor', async () => {
    await writeFile(path, encode({ a: { dtype: 'F4', shape: [4], data_offsets: [0, 2] }, b: { dtype: 'U8', shape: [1], data_offsets: [2, 3] } }, 3))
    await expectFailure(readSafetensors(path), 'UNSUPPORTED', path, "tensor 'a' has dtype F4")
    expect([...(await readSafetensors(path, { names: ['b'] })).tensors.keys()]).toEqual(['b'])
  })

  it('says when memory is short', async () => {
    vi.spyOn(Tensor, 'zeros').mockImplementation(() => {
      throw new RangeError('no')
    })
    await writeFile(path, encode({ a: f32 }, 8))
    await expectFailure(readSafetensors(path), 'OUT_OF_MEMORY', path, "tensor 'a' takes 8 bytes")
  })

  it('tells missing, unreadable and odd files from bad ones', async () => {
    const missing = await expectFailure(readSafetensors(join(folder, 'missing')), 'IO', 'missing', 'ENOENT')
    expect(missing.cause).toMatchObject({ code: 'ENOENT' })
    await expectFailure(readSafetensors(folder), 'IO', 'it is no regular file')
    await expectFailure(readSafetensors('a\0b'), 'IO')
    await expectFailure(readSafetensors(7 as never), 'INVALID_ARGUMENT', 'path is 7')
    await expectFailure(readSafetensors(new URL('http://localhost/x')), 'INVALID_ARGUMENT', 'path is http://localhost/x')
    if (process.platform !== 'win32') {
      const pipe = join(folder, 'pipe')
      execFileSync('mkfifo', [pipe])
      await expectFailure(readSafetensors(pipe), 'IO', 'it is no regular file')
    }
    await writeFile(path, encode({ a: f32 }, 8))
    const prototype = await handlePrototype()
    vi.spyOn(prototype, 'readv').mockRejectedValue(Object.assign(new Error('EIO: i/o error, read'), { code: 'EIO' }))
    const unreadable = await expectFailure(readSafetensors(path), 'IO', path, 'EIO')
    expect(unreadable.cause).toMatchObject({ code: 'EIO' })
  })

  it('tells a file that shrinks while it is read', async () => {
    await writeFile(path, encode({ a: f32 }, 8))
    const prototype = await handlePrototype()
    const { readv } = prototype
    let calls = 0
    vi.spyOn(prototype, 'readv').mockImplementation(function (this: FileHandle, buffers, position) {
      return (++calls === 3 ? Promise.resolve({ bytesRead: 0, buffers }) : readv.call(this, buffers, position)) as never
    })
    await expectFailure(readSafetensors(path), 'BAD_FILE', path, 'was longer a moment ago')
  })

  it('survives any change of a valid file', async () => {
    await writeSafetensors(
      path,
      { a: counting('float32', [2, 3]), b: counting('int16', [5]), c: counting('uint8', [3, 0]), 'd.é': counting('bool', []) },
      { format: 'pt' },
    )
    const good = new Uint8Array(await readFile(path))
    const length = Number(new DataView(good.buffer).getBigUint64(0, true))
    const expected = parseHeader(good.subarray(8, 8 + length), good.length - 8 - length, 'file')
    const shape = (header: typeof expected): string => JSON.stringify(header)

    // In memory: every byte of the header, in many ways.
    let refused = 0
    for (let i = 8; i < 8 + length; i++) {
      for (let bit = 0; bit < 8; bit++) {
        const changed = good.slice(8, 8 + length)
        changed[i - 8]! ^= 1 << bit
        try {
          const { entries } = parseHeader(changed, good.length - 8 - length, 'file')
          // What passes describes the same bytes: a name, a text or a dtype of the same size has changed.
          const sizes = (list: typeof entries): number[][] => list.map(({ begin, end }) => [begin, end])
          expect(sizes(entries)).toEqual(sizes(expected.entries))
          for (const { type, dims, begin, end } of entries) {
            if (type !== undefined) expect(dims.reduce((a, b) => a * b, elementBytes(type))).toBe(end - begin)
          }
        } catch (error) {
          expect(error).toBeInstanceOf(LaproxError)
          expect((error as LaproxError).code).toBe('BAD_FILE')
          refused++
        }
      }
    }
    expect(refused).toBeGreaterThan(length * 4)

    // On disk: several bytes anywhere, pieces lost or repeated.
    const changes = fc.array(fc.tuple(fc.nat(good.length - 1), fc.nat(255)), { minLength: 1, maxLength: 4 })
    await fc.assert(
      fc.asyncProperty(changes, fc.nat(good.length), fc.integer({ min: -3, max: 3 }), async (bytes, at, shift) => {
        const changed = Buffer.concat([good.subarray(0, at), good.subarray(Math.max(0, at + shift))])
        for (const [i, value] of bytes) if (i < changed.length) changed[i] = value
        await writeFile(path, changed)
        try {
          const { tensors } = await readSafetensors(path)
          for (const tensor of tensors.values()) expect(tensor.data.length).toBe(tensor.size)
        } catch (error) {
          expect(error).toBeInstanceOf(LaproxError)
          expect(['BAD_FILE', 'UNSUPPORTED']).toContain((error as LaproxError).code)
        }
      }),
      { seed: 11, numRuns: 400 },
    )
    expect(shape(parseHeader(good.subarray(8, 8 + length), good.length - 8 - length, 'file'))).toBe(shape(expected))
  })

  it('survives any JSON for a header', () => {
    const value = fc.oneof(fc.jsonValue(), fc.constantFrom('F32', 'U8', [0, 4], [1], [], [0, 0], 0))
    const entry = fc.oneof(value, fc.record({ dtype: value, shape: value, data_offsets: value }, { requiredKeys: [] }))
    const names = fc.oneof(fc.string(), fc.constantFrom('__metadata__', '__proto__', 'a'))
    fc.assert(
      fc.property(fc.dictionary(names, entry), fc.nat(8), (header, bytes) => {
        try {
          const { entries } = parseHeader(new TextEncoder().encode(JSON.stringify(header)), bytes, 'file')
          expect(entries.at(-1)?.end ?? 0).toBe(bytes)
        } catch (error) {
          expect(error).toBeInstanceOf(LaproxError)
        }
      }),
      { seed: 12, numRuns: 1000 },
    )
  })
})

describe('large files', () => {
  it('reads beyond 2 GiB without reading what lies before', async () => {
    // A sparse file: the hole takes neither disk nor time.
    const hole = 3 * 2 ** 30
    const header = encode(
      { a: { dtype: 'U8', shape: [hole], data_offsets: [0, hole] }, b: { dtype: 'I32', shape: [3], data_offsets: [hole, hole + 12] } },
      0,
    )
    const handle = await open(path, 'w')
    await handle.write(header, 0, header.length, 0)
    await handle.write(new Uint8Array(Int32Array.of(7, -8, 9).buffer), 0, 12, header.length + hole)
    await handle.close()
    try {
      const { tensors } = await readSafetensors(path, { names: ['b'] })
      expect(Array.from(tensors.get('b')!.data as Int32Array)).toEqual([7, -8, 9])
    } finally {
      await rm(path)
    }
  })
})

describe('failed and aborted calls', () => {
  const before = { old: counting('float32', [4]) }
  /** Larger than one write: 40 MiB. */
  const large = (): Record<string, Tensor> => ({ a: Tensor.zeros('float32', [5, 2 ** 20]), b: Tensor.zeros('float32', [5, 2 ** 20]) })

  async function expectUntouched(): Promise<void> {
    expect((await readdir(folder)).filter((name) => name.endsWith('.tmp'))).toEqual([])
    expect([...(await readSafetensors(path)).tensors.keys()]).toEqual(['old'])
  }

  it.each(['writev', 'sync'] as const)('leaves nothing behind when %s fails', async (method) => {
    await writeSafetensors(path, before)
    const prototype = await handlePrototype()
    const original = prototype[method] as (...given: unknown[]) => Promise<void>
    let calls = 0
    vi.spyOn(prototype, method as 'sync').mockImplementation(async function (this: FileHandle, ...given: unknown[]): Promise<void> {
      if (method === 'writev' && ++calls === 1) return original.apply(this, given)
      throw Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' })
    })
    const error = await expectFailure(writeSafetensors(path, large()), 'IO', path, 'ENOSPC')
    expect(error.cause).toMatchObject({ code: 'ENOSPC' })
    vi.restoreAllMocks()
    await expectUntouched()
  })

  it('says what the file system said', async () => {
    await expectFailure(writeSafetensors(join(folder, 'no', 'file'), before), 'IO', 'ENOENT')
    const occupied = join(folder, 'occupied')
    await mkdir(occupied)
    await expectFailure(writeSafetensors(occupied, before), 'IO', 'occupied could not be written')
  })

  it('replaces a link by the file, and leaves its target alone', async () => {
    await writeSafetensors(path, before)
    const link = join(folder, 'link')
    await symlink(path, link)
    await writeSafetensors(link, { other: counting('uint8', [1]) })
    await expectUntouched()
    expect([...(await readSafetensors(link)).tensors.keys()]).toEqual(['other'])
  })

  it('is aborted before and while it writes', async () => {
    await writeSafetensors(path, before)
    const aborted = await expectFailure(writeSafetensors(path, large(), {}, { signal: AbortSignal.abort('stop') }), 'ABORTED')
    expect(aborted.cause).toBe('stop')
    const controller = new AbortController()
    const prototype = await handlePrototype()
    const { writev } = prototype
    vi.spyOn(prototype, 'writev').mockImplementation(async function (this: FileHandle, buffers, position) {
      controller.abort()
      return writev.call(this, buffers, position)
    })
    await expectFailure(writeSafetensors(path, large(), {}, { signal: controller.signal }), 'ABORTED')
    await expectUntouched()
  })

  it('is aborted before and while it reads', async () => {
    await writeSafetensors(path, large())
    await expectFailure(readSafetensors(path, { signal: AbortSignal.abort() }), 'ABORTED')
    const controller = new AbortController()
    const prototype = await handlePrototype()
    const { readv } = prototype
    vi.spyOn(prototype, 'readv').mockImplementation(async function (this: FileHandle, buffers, position) {
      controller.abort()
      return readv.call(this, buffers, position)
    })
    await expectFailure(readSafetensors(path, { signal: controller.signal }), 'ABORTED')
  })

  it('notices tensors that go away', async () => {
    await writeSafetensors(path, before)
    const gone = Tensor.zeros('float32', [1])
    gone.dispose()
    await expectFailure(writeSafetensors(path, { gone }), 'DISPOSED')
    const prototype = await handlePrototype()
    const { writev } = prototype
    for (const code of ['DISPOSED', 'DETACHED'] as const) {
      const tensors = large()
      vi.spyOn(prototype, 'writev').mockImplementation(async function (this: FileHandle, buffers, position) {
        const result = await writev.call(this, buffers, position)
        const { a } = tensors
        if (code === 'DISPOSED') a!.dispose()
        else if (a!.data.buffer.byteLength > 0) structuredClone(0, { transfer: [a!.data.buffer as ArrayBuffer] })
        vi.restoreAllMocks()
        return result
      })
      await expectFailure(writeSafetensors(path, tensors), code, 'float32 [5, 1048576]')
      await expectUntouched()
    }
  })

  it.each([
    ['tensors that are none', () => writeSafetensors(path, null as never), 'tensors is null'],
    [
      'a value that is no tensor',
      () => writeSafetensors(path, { a: new Float32Array(1) as never }),
      "tensors['a'] is Float32Array(1); expected a Tensor",
    ],
    ['the reserved name', () => writeSafetensors(path, { __metadata__: Tensor.zeros('int8', [1]) }), "'__metadata__'"],
    ['half a character', () => writeSafetensors(path, { '\ud800': Tensor.zeros('int8', [1]) }), 'expected a well-formed string'],
    ['a name that is none', () => writeSafetensors(path, new Map([[7 as never, Tensor.zeros('int8', [1])]])), 'a tensor name is 7'],
    ['metadata of numbers', () => writeSafetensors(path, {}, { a: 1 as never }), "metadata['a'] is 1"],
    ['metadata of text', () => writeSafetensors(path, {}, 'pt' as never), "metadata is 'pt'"],
    ['a header beyond the limit', () => writeSafetensors(path, {}, { a: 'x'.repeat(100_000_000) }), 'at most 100000000'],
  ])('refuses %s', async (_what, call, message) => {
    await writeSafetensors(path, before)
    await expectFailure(call(), 'INVALID_ARGUMENT', message)
    await expectUntouched()
  })
})
