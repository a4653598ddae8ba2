import { type CallOptions, call } from './call.js'
import {
  alignedRows,
  byteExtent,
  byteStride,
  contiguousRows,
  floatType,
  located,
  maxInt32,
  object,
  sameType,
  shape,
  tensors,
  wrong,
} from './check.js'
import { type Device, handleOf } from './device.js'
import { startWork } from './enqueue.js'
import { LaproxError } from './errors.js'
import { allocateOn, type DeviceMemory } from './memory.js'
import { floatTypes } from './model.js'
import { native, type Section, SectionWriter, stage } from './native.js'
import { elementBytes, type FloatType, onDevice, packed, placeOf, Tensor } from './tensor.js'

/** Integers in memory: they are copied. */
export type Integers = Int32Array | readonly number[] | Tensor<'int32'>

/**
 * What every kind of cache has: tensors per layer, all of one float type, with any strides but rows [d] without gaps. They are in
 * the memory of the cache's device: on a GPU, where rows begin at multiples of 16 bytes, an engine's own
 * ({@link Tensor.fromDevicePointer}), or the device's. Lengths are the host's everywhere; page tables of a GPU may be either's.
 */
interface Planes {
  /** Per layer, rotated: those that attention sees. */
  readonly keys: readonly Tensor[]
  /** Per layer, of the dims of `keys`. */
  readonly values: readonly Tensor[]
  /** Original positions, ascending along each head: int32 of the dims of `keys` without the last. Default: the token's index. */
  readonly positions?: readonly Tensor[] | undefined
  /** ||v||_2 of each row, kept by whoever appended it, which saves a read of V: float32 of the dims of `keys` without the last. */
  readonly valueNorms?: readonly Tensor[] | undefined
  /** [S] tokens that each sequence has read so far. Required with `positions`. */
  readonly contextLengths?: Integers | undefined
}

/** Keys and values [G, n, d], or [S, G, n, d] for a batch. Layers may differ in n. */
export interface ContiguousDescription extends Planes {
  /** Tokens of each sequence [S], or of each head [S * G]: for all layers, or per layer. Default: n. */
  readonly lengths?: Integers | readonly Integers[] | undefined
}

/**
 * Keys and values in pages. Token t of a head lies in slot t % pageSize of page `pageTable[..., floor(t / pageSize)]`.
 *
 * | `layout` | dims of keys and values |
 * |---|---|
 * | `NHD` | [pages, pageSize, G, d] |
 * | `HND` | [pages, G, pageSize, d] |
 * | either | [pages, pageSize, d]: pages of one head each, with a table per head |
 */
export interface PagedDescription extends Planes {
  /** What the dims of keys and values are; of pages of one head each, [pages, pageSize, d], either. */
  readonly layout: 'NHD' | 'HND'
  /** int32 [S, P], shared by the heads, or [S, G, P]: for all layers, or per layer. Entries that no token needs may hold anything. */
  readonly pageTable: Tensor | readonly Tensor[]
  /** Tokens of each sequence [S], or of each head [S * G]: for all layers, or per layer. */
  readonly lengths: Integers | readonly Integers[]
}

/** Keys and values as rows [rows, d] without gaps between the heads: segment after segment, in the order (sequence, head). */
export interface RaggedDescription extends Planes {
  /** Tokens of each head [S * G]: for all layers, or per layer. S is the length of `contextLengths`, or 1. */
  readonly lengths: Integers | readonly Integers[]
}

/** What {@link KvCache.from} takes: contiguous or ragged by the rank of `keys`, paged where there is a `pageTable`. */
export type CacheDescription = ContiguousDescription | PagedDescription | RaggedDescription

/** What a cache is, checked. Internal to lib: {@link KvCache} is what users see. */
export interface CacheState {
  readonly kind: 'contiguous' | 'paged' | 'ragged'
  readonly type: FloatType
  readonly layers: number
  readonly sequences: number
  readonly kvHeads: number
  readonly headDim: number
  readonly keys: readonly Tensor[]
  readonly values: readonly Tensor[]
  readonly positions: readonly Tensor[] | undefined
  readonly valueNorms: readonly Tensor[] | undefined
  /** [layers * sequences * kvHeads] */
  readonly lengths: Int32Array
  /** [sequences] */
  readonly contextLengths: Int32Array | undefined
  /** Which dimension of the keys is which; -1 for none. */
  readonly axes: Axes
  /** Per layer, of a paged cache. */
  readonly tables: readonly Tensor[] | undefined
  /** First rows [layers * sequences * kvHeads] within their layer, of a ragged cache. */
  readonly starts: Int32Array | undefined
  /** Memory of a GPU that goes with the cache. */
  readonly owned?: readonly DeviceMemory[]
  readonly pagesUsed?: readonly number[]
  readonly freedPages?: readonly Int32Array[]
}

/** What is known of a cache before its state is made. */
export interface Outline {
  readonly kind: CacheState['kind']
  readonly type: FloatType
  readonly layers: number
  readonly sequences: number
  readonly kvHeads: number
  readonly headDim: number
  readonly entries: number
  readonly owned: readonly DeviceMemory[] | undefined
  readonly pagesUsed?: readonly number[] | undefined
  readonly freedPages?: readonly Int32Array[] | undefined
}

/** Dimensions of the keys: of a ragged cache, whose page ids are first rows, pages and tokens are one. */
export interface Axes {
  readonly page: number
  readonly token: number
  readonly head: number
}

/** The checked state of a cache with its native description; throws `DISPOSED` or `DETACHED` where its memory is gone. */
export let stateOf: (cache: KvCache) => { readonly state: CacheState; readonly section: Section }
/** A cache of a checked state. */
export let cacheOf: (device: Device, state: CacheState) => KvCache
/** A cache whose state is made when somebody asks for it. */
export let lazyCacheOf: (device: Device, outline: Outline, state: () => CacheState) => KvCache
/** Ends a cache whose tensors, and memory, are now another's. */
export let succeed: (cache: KvCache) => void

/**
 * The keys and values of a model's layers for a batch of S sequences: a description of tensors that stay where they are. Keys
 * are those that attention sees, rotated. Lengths are copied, page tables are not.
 *
 *     KvCache.from(device, { keys, values })                                        // [G, n, d] per layer
 *     KvCache.from(device, { keys, values, layout: 'NHD', pageTable, lengths })     // [pages, pageSize, G, d] per layer
 */
export class KvCache implements Disposable {
  /** Whose memory the tensors are in, and where calls on the cache run. */
  readonly device: Device
  /** How tokens are found. */
  readonly kind: 'contiguous' | 'paged' | 'ragged'
  /** Of the keys and values. */
  readonly type: FloatType
  /** L. */
  readonly layers: number
  /** S. */
  readonly sequences: number
  /** G. */
  readonly kvHeads: number
  /** d. */
  readonly headDim: number
  /** Tokens of all layers, sequences and heads together. */
  readonly entries: number
  /** Of the keys and values of these entries. */
  readonly bytes: number
  /** What a compaction into pages took from the front of each of its free lists; undefined for other caches. */
  readonly pagesUsed: readonly number[] | undefined
  /** Per layer, the ids of pages that an in-place compaction left without any row; undefined for other caches. */
  readonly freedPages: readonly Int32Array[] | undefined
  #state: CacheState | (() => CacheState) | undefined
  #section: Section | undefined
  #owned: readonly DeviceMemory[] | undefined

  private constructor(device: Device, outline: Outline, state: CacheState | (() => CacheState)) {
    this.device = device
    this.kind = outline.kind
    this.type = outline.type
    this.layers = outline.layers
    this.sequences = outline.sequences
    this.kvHeads = outline.kvHeads
    this.headDim = outline.headDim
    this.entries = outline.entries
    this.bytes = outline.entries * 2 * outline.headDim * elementBytes(outline.type)
    this.pagesUsed = outline.pagesUsed
    this.freedPages = outline.freedPages
    this.#owned = outline.owned
    this.#state = state
  }

  static {
    cacheOf = (device, state) => new KvCache(device, outlineOf(state), state)
    lazyCacheOf = (device, outline, state) => new KvCache(device, outline, state)
    stateOf = (cache) => {
      if (!(cache instanceof KvCache)) throw wrong('cache', cache, 'a KvCache')
      const state = cache.#alive()
      checkAlive(state.keys)
      checkAlive(state.values)
      checkAlive(state.positions)
      checkAlive(state.valueNorms)
      checkAlive(state.tables)
      cache.#section ??= encode(state)
      return { state, section: cache.#section }
    }
    succeed = (cache) => {
      cache.#state = undefined
      cache.#section = undefined
      cache.#owned = undefined
    }
  }

  /**
   * Describes a cache to a device; nothing is copied but lengths.
   *
   * @throws LaproxError `INVALID_ARGUMENT` for shapes, types and lengths that do not fit together, `OUT_OF_BOUNDS` for lengths
   *   beyond their buffers, `DISPOSED`, `DETACHED`. Page ids are checked by the calls that follow them.
   */
  static from(device: Device, description: CacheDescription): KvCache {
    handleOf(device)
    object(description, 'description', 'an object with keys and values')
    return cacheOf(device, check(description, device))
  }

  /**
   * Computes ||v||_2 of every row and keeps it with the cache, which saves each selection by `joint` or `bound` a read of V. Where the
   * cache was described with `valueNorms`, they are written there; else the cache allocates them. Compactions move them along.
   *
   * @throws LaproxError (as a rejection) `OUT_OF_BOUNDS` for page ids that leave their buffer, `OUT_OF_MEMORY`, `DISPOSED`,
   *   `DETACHED`, `DEVICE_ERROR`, `ABORTED`
   */
  async computeValueNorms(options?: CallOptions): Promise<void> {
    const { state } = stateOf(this)
    const device = handleOf(this.device)
    await call(this.device, options, async (hooks) => {
      const gpu = this.device.backend === 'cuda'
      const planes = normPlanes(state)
      let owned = state.owned
      let { valueNorms } = state
      if (valueNorms === undefined) {
        let memory: DeviceMemory | undefined
        if (gpu) {
          memory = await allocateOn(this.device, planes.elements * 4, hooks)
          owned = [...(owned ?? []), memory]
        }
        const host = memory === undefined ? new Float32Array(planes.elements) : undefined
        valueNorms = planes.layers.map(({ dims, first }) =>
          host === undefined ? onDevice('float32', memory!, dims, { offset: first }) : new Tensor('float32', host, dims, { offset: first }),
        )
      }
      const next: CacheState = { ...state, valueNorms, ...(owned === undefined ? {} : { owned }) }
      const section = encode(next)
      try {
        if (gpu) await startWork(device, { stages: stage.valueNorms, cache: section, keep: next }, hooks)
        else await native().valueNorms(device, section.numbers, [undefined, hooks.progress, hooks.flag, ...section.buffers])
        this.#alive()
      } catch (error) {
        if (owned !== state.owned) owned!.at(-1)!.dispose()
        throw error
      }
      this.#state = next
      this.#section = section
      this.#owned = owned
    })
  }

  /** [S * G] tokens of each head of a layer: a copy. */
  lengths(layer: number): Int32Array {
    return this.#segments(this.#alive().lengths, layer).slice()
  }

  /** [S * G + 1] sums of the lengths before each head: where its rows begin in a ragged cache that no in-place compaction has thinned. */
  cumulativeLengths(layer: number): Int32Array {
    return cumulative(this.#segments(this.#alive().lengths, layer))
  }

  /** [S * G] the row of {@link KvCache.keys} that each head of a ragged cache begins at. */
  rowStarts(layer: number): Int32Array {
    const { starts } = this.#alive()
    if (starts === undefined) throw new LaproxError('INVALID_ARGUMENT', `rowStarts: the cache is ${this.kind}; expected a ragged one`)
    return this.#segments(starts, layer).slice()
  }

  /** The keys of a layer as they were described: rows [rows, d] of a ragged cache. */
  keys(layer: number): Tensor<FloatType> {
    return this.#layer(this.#alive().keys, layer) as Tensor<FloatType>
  }

  /** The values of a layer as they were described: rows [rows, d] of a ragged cache. */
  values(layer: number): Tensor<FloatType> {
    return this.#layer(this.#alive().values, layer) as Tensor<FloatType>
  }

  /**
   * The original positions of a layer: [rows] of a ragged cache.
   *
   * @throws LaproxError `INVALID_ARGUMENT` where the cache has none: see {@link KvCache.hasPositions}
   */
  positions(layer: number): Tensor<'int32'> {
    const { positions } = this.#alive()
    if (positions === undefined) {
      throw new LaproxError('INVALID_ARGUMENT', 'positions: the cache has none; the position of token t is t')
    }
    return this.#layer(positions, layer) as Tensor<'int32'>
  }

  /**
   * ||v||_2 of the rows of a layer.
   *
   * @throws LaproxError `INVALID_ARGUMENT` where the cache does not keep them: see {@link KvCache.computeValueNorms}
   */
  valueNorms(layer: number): Tensor<'float32'> {
    const { valueNorms } = this.#alive()
    if (valueNorms === undefined) throw new LaproxError('INVALID_ARGUMENT', 'valueNorms: the cache has none; computeValueNorms makes them')
    return this.#layer(valueNorms, layer) as Tensor<'float32'>
  }

  /** Whether it knows original positions; else the position of token t is t. */
  get hasPositions(): boolean {
    return this.#alive().positions !== undefined
  }

  /** Whether it keeps ||v||_2 of its rows. */
  get hasValueNorms(): boolean {
    return this.#alive().valueNorms !== undefined
  }

  /**
   * The page table of a layer, [S, P] or [S, G, P].
   *
   * @throws LaproxError `INVALID_ARGUMENT` where the cache is not paged
   */
  pageTable(layer: number): Tensor<'int32'> {
    const { tables } = this.#alive()
    if (tables === undefined) throw new LaproxError('INVALID_ARGUMENT', `pageTable: the cache is ${this.kind}; expected a paged one`)
    return this.#layer(tables, layer) as Tensor<'int32'>
  }

  /** [S] tokens that each sequence has read so far: a copy, or undefined where the cache does not say. */
  contextLengths(): Int32Array | undefined {
    return this.#alive().contextLengths?.slice()
  }

  /**
   * Lets go of the tensors, which live on where others hold them; but memory of a GPU that a compaction has allocated for the
   * cache goes back, once the calls that use it have ended. Using the cache is an error from now on; doing it twice is not.
   */
  dispose(): void {
    const owned = this.#owned
    this.#state = undefined
    this.#section = undefined
    this.#owned = undefined
    if (owned !== undefined) for (const memory of owned) memory.dispose()
  }

  /** What `using` calls: {@link KvCache.dispose}. */
  [Symbol.dispose](): void {
    this.dispose()
  }

  /** Whether it has been disposed of. */
  get disposed(): boolean {
    return this.#state === undefined
  }

  #alive(): CacheState {
    if (this.#state === undefined) throw new LaproxError('DISPOSED', 'the cache was used after its disposal')
    if (typeof this.#state === 'function') this.#state = this.#state()
    return this.#state
  }

  #layer<T>(list: readonly T[], layer: number): T {
    const item = list[layer]
    if (item === undefined) throw new LaproxError('OUT_OF_BOUNDS', `layer is ${layer}; expected 0 to ${this.layers - 1}`)
    return item
  }

  #segments(all: Int32Array, layer: number): Int32Array {
    if (!Number.isInteger(layer) || layer < 0 || layer >= this.layers) {
      throw new LaproxError('OUT_OF_BOUNDS', `layer is ${layer}; expected 0 to ${this.layers - 1}`)
    }
    const count = this.sequences * this.kvHeads
    return all.subarray(layer * count, (layer + 1) * count)
  }
}

function outlineOf(state: CacheState): Outline {
  let entries = 0
  for (const length of state.lengths) entries += length
  const { kind, type, layers, sequences, kvHeads, headDim, owned, pagesUsed, freedPages } = state
  return { kind, type, layers, sequences, kvHeads, headDim, entries, owned, pagesUsed, freedPages }
}

/** Throws where a tensor has been disposed of or detached. */
function checkAlive(list: readonly Tensor[] | undefined): void {
  if (list !== undefined) for (let i = 0; i < list.length; i++) placeOf(list[i]!)
}

/** [n + 1] sums of what comes before. */
export function cumulative(lengths: Int32Array): Int32Array {
  const sums = new Int32Array(lengths.length + 1)
  for (let i = 0; i < lengths.length; i++) sums[i + 1] = sums[i]! + lengths[i]!
  return sums
}

function check(description: CacheDescription, device: Device): CacheState {
  const keys = tensors(description.keys, 'keys')
  const layers = keys.length
  const values = tensors(description.values, 'values', layers)
  const type = floatType(keys, 'keys')
  sameType(values, 'values', type)
  const paged = 'pageTable' in description && description.pageTable !== undefined ? description : undefined
  const tables = paged && checkTables(paged, layers)
  const rank = keys[0]!.dims.length
  const kind = paged === undefined ? (rank === 2 ? 'ragged' : 'contiguous') : 'paged'
  const axes = axesOf(kind, rank, paged?.layout, keys[0]!)
  const { dims } = keys[0]!
  const headDim = dims[rank - 1]!
  if (headDim < 8 || headDim > 256 || headDim % 8 !== 0) throw wrong('keys[0]', keys[0], 'a head dimension d that is a multiple of 8, 8 to 256')

  const contexts = description.contextLengths === undefined ? undefined : integers(description.contextLengths, 'contextLengths')
  const given = perLayerIntegers(description.lengths, layers)
  const { sequences, kvHeads } = heads(kind, axes, keys[0]!, tables?.[0], given?.[0], contexts)
  if (tables !== undefined) {
    for (const [i, table] of tables.entries()) {
      shape(table, `pageTable[${i}]`, table.dims.length === 2 ? [sequences, -1] : [sequences, kvHeads, -1], '[S, P] or [S, G, P]')
    }
  }

  for (const [list, at] of [
    [keys, 'keys'],
    [values, 'values'],
    [description.positions, 'positions'],
    [description.valueNorms, 'valueNorms'],
  ] as const) {
    if (Array.isArray(list))
      located(
        list.filter((tensor) => tensor instanceof Tensor),
        at,
        device,
      )
  }
  if (device.backend === 'cpu') located(tables, 'pageTable', device)
  checkKeys(keys, axes, { sequences, kvHeads, headDim }, kind)
  checkPlane(values, 'values', keys, headDim)
  const positions = optionalPlane(description.positions, 'positions', keys, 'int32')
  const valueNorms = optionalPlane(description.valueNorms, 'valueNorms', keys, 'float32')
  if (positions !== undefined && contexts === undefined) {
    throw wrong('contextLengths', undefined, 'the tokens that each sequence has read so far [S], since there are positions')
  }
  if (contexts !== undefined && contexts.length !== sequences) {
    throw new LaproxError('INVALID_ARGUMENT', `contextLengths has ${contexts.length} numbers; expected one per sequence, ${sequences}`)
  }

  const capacities = keys.map((tensor, i) => tensor.dims[axes.token]! * (tables === undefined ? 1 : tables[i]!.dims.at(-1)!))
  if (given === undefined && kind === 'paged') throw wrong('lengths', undefined, 'the tokens of each sequence [S] of a paged cache')
  const lengths = spread(given, capacities, sequences, kvHeads, kind === 'ragged')
  const starts = kind === 'ragged' ? denseStarts(lengths, keys) : undefined
  if (contexts !== undefined && positions !== undefined) {
    for (const [i, length] of lengths.entries()) {
      const context = contexts[Math.floor(i / kvHeads) % sequences]!
      if (length > context)
        throw new LaproxError('INVALID_ARGUMENT', `contextLengths: ${context} is below ${length}, the tokens of a head of that sequence`)
    }
  }
  return {
    kind,
    type,
    layers,
    sequences,
    kvHeads,
    headDim,
    keys: [...keys],
    values: [...values],
    positions,
    valueNorms,
    lengths,
    contextLengths: contexts,
    axes,
    tables,
    starts,
  }
}

/** How many sequences and KV heads there are: it stands in different places. */
function heads(
  kind: CacheState['kind'],
  axes: Axes,
  keys: Tensor,
  table: Tensor | undefined,
  lengths: Int32Array | undefined,
  contexts: Int32Array | undefined,
): { sequences: number; kvHeads: number } {
  let sequences = 1
  let kvHeads = axes.head >= 0 ? keys.dims[axes.head]! : 1
  if (kind === 'ragged') {
    if (lengths === undefined) throw wrong('lengths', undefined, 'the tokens of each head [S * G] of a ragged cache')
    sequences = contexts?.length ?? 1
    kvHeads = lengths.length / sequences
    if (!Number.isInteger(kvHeads)) {
      throw new LaproxError(
        'INVALID_ARGUMENT',
        `lengths has ${lengths.length} numbers; expected a multiple of the ${sequences} sequences of contextLengths`,
      )
    }
  } else if (table !== undefined) {
    sequences = table.dims[0]!
    if (axes.head < 0 && table.dims.length === 3) kvHeads = table.dims[1]!
  } else if (axes.page >= 0) {
    sequences = keys.dims[axes.page]!
  }
  if (sequences < 1 || kvHeads < 1) throw wrong('keys[0]', keys, 'at least one sequence and one KV head')
  return { sequences, kvHeads }
}

/** Which dimension is which. */
export function axesOf(kind: CacheState['kind'], rank: number, layout?: string, example?: Tensor): Axes {
  if (kind === 'ragged') return { page: 0, token: 0, head: -1 }
  if (kind === 'contiguous') {
    if (rank === 3) return { page: -1, token: 1, head: 0 }
    if (rank === 4) return { page: 0, token: 2, head: 1 }
    throw wrong('keys[0]', example, '[G, n, d], [S, G, n, d] or (ragged) [rows, d]; for pages, give a pageTable')
  }
  if (layout !== 'NHD' && layout !== 'HND') throw wrong('layout', layout, "'NHD' or 'HND'")
  if (rank === 3) return { page: 0, token: 1, head: -1 }
  if (rank === 4) return layout === 'NHD' ? { page: 0, token: 1, head: 2 } : { page: 0, token: 2, head: 1 }
  throw wrong(
    'keys[0]',
    example,
    layout === 'NHD' ? '[pages, pageSize, G, d] or [pages, pageSize, d]' : '[pages, G, pageSize, d] or [pages, pageSize, d]',
  )
}

function checkTables({ pageTable }: PagedDescription, layers: number): readonly Tensor[] {
  const list = Array.isArray(pageTable) ? tensors(pageTable, 'pageTable', layers) : Array<Tensor>(layers).fill(pageTable as Tensor)
  for (const [i, table] of list.entries()) {
    const at = Array.isArray(pageTable) ? `pageTable[${i}]` : 'pageTable'
    if (!(table instanceof Tensor)) throw wrong(at, table, 'an int32 Tensor, or one per layer')
    const rank = table.dims.length
    if (table.type !== 'int32' || (rank !== 2 && rank !== 3) || rank !== list[0]!.dims.length) {
      throw wrong(at, table, 'int32 [S, P] or [S, G, P], alike for all layers')
    }
    contiguousRows(table, at)
    if (table.dims.at(-1) === 0) throw wrong(at, table, 'room for at least one page')
  }
  return list
}

function checkKeys(
  keys: readonly Tensor[],
  axes: Axes,
  { sequences, kvHeads, headDim }: { sequences: number; kvHeads: number; headDim: number },
  kind: CacheState['kind'],
): void {
  const first = keys[0]!
  for (const [i, tensor] of keys.entries()) {
    const expected = first.dims.map(() => -1)
    expected[expected.length - 1] = headDim
    if (axes.head >= 0) expected[axes.head] = kvHeads
    if (kind === 'contiguous' && axes.page >= 0) expected[axes.page] = sequences
    shape(tensor, `keys[${i}]`, expected, 'dims as those of keys[0]')
    contiguousRows(tensor, `keys[${i}]`)
    alignedRows(tensor, 'keys', i)
    const rows = tensor.dims[axes.token]!
    if (rows > maxInt32 || (kind === 'paged' && rows === 0)) {
      throw wrong(`keys[${i}]`, tensor, kind === 'paged' ? 'pages of at least one token' : `at most ${maxInt32} rows`)
    }
  }
}

/** Values have the dims of the keys; positions and norms all but the last. */
export function checkPlane(list: readonly Tensor[], at: string, keys: readonly Tensor[], headDim: number | undefined): void {
  for (const [i, tensor] of list.entries()) {
    const dims = headDim === undefined ? keys[i]!.dims.slice(0, -1) : keys[i]!.dims
    shape(tensor, `${at}[${i}]`, dims, headDim === undefined ? 'the dims of keys without the last' : 'the dims of keys')
    if (headDim === undefined) continue
    contiguousRows(tensor, `${at}[${i}]`)
    alignedRows(tensor, at, i)
  }
}

/** Checks positions or value norms. */
export function optionalPlane(
  given: readonly Tensor[] | undefined,
  at: string,
  keys: readonly Tensor[],
  type: 'int32' | 'float32',
): readonly Tensor[] | undefined {
  if (given === undefined) return undefined
  const list = tensors(given, at, keys.length)
  sameType(list, at, type)
  checkPlane(list, at, keys, undefined)
  return [...list]
}

/** Integers of at least 0, copied. */
export function integers(given: unknown, at: string): Int32Array {
  const source = given instanceof Tensor && given.type === 'int32' ? packed(given as Tensor<'int32'>) : given
  if (!(source instanceof Int32Array) && !Array.isArray(source)) throw wrong(at, given, 'an Int32Array, an int32 Tensor or an array of integers')
  for (let i = 0; i < source.length; i++) {
    const value: unknown = source[i]
    if (!Number.isInteger(value) || (value as number) < 0 || (value as number) > maxInt32)
      throw wrong(`${at}[${i}]`, value, 'an integer of at least 0')
  }
  return Int32Array.from(source as ArrayLike<number>)
}

/** One list for all layers, or one per layer. */
function perLayerIntegers(given: CacheDescription['lengths'], layers: number): readonly Int32Array[] | undefined {
  if (given === undefined) return undefined
  if (!Array.isArray(given) || typeof given[0] === 'number') return [integers(given, 'lengths')]
  if (given.length !== layers) throw new LaproxError('INVALID_ARGUMENT', `lengths has ${given.length} items; expected one per layer, ${layers}`)
  return given.map((list, i) => integers(list, `lengths[${i}]`))
}

/** [layers * S * G] tokens of each head; `capacities` are those of each layer's heads. */
function spread(
  given: readonly Int32Array[] | undefined,
  capacities: readonly number[],
  sequences: number,
  kvHeads: number,
  perHeadOnly: boolean,
): Int32Array {
  const segments = sequences * kvHeads
  const result = new Int32Array(capacities.length * segments)
  for (const [layer, capacity] of capacities.entries()) {
    const list = given?.[given.length === 1 ? 0 : layer]
    const at = given?.length === 1 ? 'lengths' : `lengths[${layer}]`
    const perHead = list?.length === segments
    if (list !== undefined && !perHead && (perHeadOnly || list.length !== sequences)) {
      const expected = perHeadOnly ? `one per head, ${segments}` : `one per sequence, ${sequences}, or per head, ${segments}`
      throw new LaproxError('INVALID_ARGUMENT', `${at} has ${list.length} numbers; expected ${expected}`)
    }
    for (let i = 0; i < segments; i++) {
      const index = perHead ? i : Math.floor(i / kvHeads)
      const length = list === undefined ? capacity : list[index]!
      if (length > capacity) {
        throw new LaproxError('OUT_OF_BOUNDS', `${at}[${index}] is ${length}; layer ${layer} has room for ${capacity} tokens`)
      }
      result[layer * segments + i] = length
    }
  }
  return result
}

/** First rows of the heads of each layer, dense in the order of segments. */
function denseStarts(lengths: Int32Array, keys: readonly Tensor[]): Int32Array {
  const starts = new Int32Array(lengths.length)
  const segments = lengths.length / keys.length
  for (const [layer, tensor] of keys.entries()) {
    const sums = cumulative(lengths.subarray(layer * segments, (layer + 1) * segments))
    const rows = tensor.dims[0]!
    if (sums[segments]! > rows) {
      throw new LaproxError('OUT_OF_BOUNDS', `lengths of layer ${layer} sum up to ${sums[segments]}; keys[${layer}] has ${rows} rows`)
    }
    starts.set(sums.subarray(0, segments), layer * segments)
  }
  return starts
}

/** Planes for value norms, one after the other: layers whose values are the same memory share one. */
function normPlanes({ values }: CacheState): { elements: number; layers: { dims: readonly number[]; first: number }[] } {
  const known = new Map<string, number>()
  const seen = new Map<unknown, number>()
  let elements = 0
  const layers = values.map((tensor) => {
    const place = placeOf(tensor)
    if (!seen.has(place)) seen.set(place, seen.size)
    const key = [seen.get(place), tensor.offset, ...tensor.dims, ...tensor.strides].join()
    const dims = tensor.dims.slice(0, -1)
    let first = known.get(key)
    if (first === undefined) {
      first = elements
      known.set(key, first)
      elements += dims.reduce((product, dim) => product * dim, 1)
    }
    return { dims, first }
  })
  return { elements, layers }
}

function encode(state: CacheState): Section {
  const { layers, sequences, kvHeads, headDim, axes } = state
  const writer = new SectionWriter()
  writer.push(floatTypes.indexOf(state.type), layers, sequences, kvHeads, headDim, writer.buffer(state.contextLengths))
  const lengths = writer.buffer(state.lengths)
  const segments = sequences * kvHeads
  for (let layer = 0; layer < layers; layer++) {
    for (const list of [state.keys, state.values, state.positions, state.valueNorms]) writePlane(writer, list?.[layer], axes)
    writer.push(Math.max(state.keys[layer]!.dims[axes.token]!, 1))
    const table = state.tables?.[layer]
    if (table !== undefined) {
      const headStride = table.dims.length === 3 ? byteStride(table, 1) / 4 : 0
      const place = placeOf(table)
      writer.push(table.dims.at(-1)!)
      if (typeof place === 'number') writer.push(-2, place + table.offset * 4)
      else writer.push(writer.buffer(place), table.offset)
      writer.push(byteStride(table, 0) / 4, headStride)
    } else if (state.starts !== undefined) {
      writer.push(1, writer.buffer(state.starts), layer * segments, kvHeads, 1)
    } else {
      writer.push(1, -1, 0, 0, 0)
    }
    writer.push(lengths, layer * segments, kvHeads, 1)
  }
  return writer.section()
}

/** A plane of rows, or none. */
export function writePlane(writer: SectionWriter, tensor: Tensor | undefined, axes: Axes): void {
  if (tensor === undefined) writer.push(-1, 0, 0, 0, 0, 0)
  else {
    writer.place(tensor)
    writer.push(byteExtent(tensor), byteStride(tensor, axes.page), byteStride(tensor, axes.token), byteStride(tensor, axes.head))
  }
}
