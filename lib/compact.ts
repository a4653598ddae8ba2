import { axesOf, type CacheState, cacheOf, checkPlane, cumulative, type KvCache, optionalPlane, stateOf, writePlane } from './cache.js'
import { type CallOptions, call, type Hooks } from './call.js'
import { allocate, byteExtent, contiguousRows, object, sameType, shape, tensors, wrong } from './check.js'
import { handleOf } from './device.js'
import { LaproxError, suggest } from './errors.js'
import { type Held, type NativeHandle, native, type Section, SectionWriter } from './native.js'
import { type Selection, selectionSection } from './selection.js'
import { elementBytes, Tensor, type TensorDataMap } from './tensor.js'

/** Into new memory, flat over all layers: the kept rows of segment after segment. The default. */
export interface RaggedTarget {
  readonly target?: 'ragged' | undefined
}

/** Into pages that a pool has free, each for one head of one layer and sequence. */
export interface PagesTarget {
  readonly target: 'pages'
  /** [pages, pageSize, d] of the cache's type: one pool for all layers, or one per layer. */
  readonly keys: readonly Tensor[]
  /** The dims of `keys`. */
  readonly values: readonly Tensor[]
  /** int32 [pages, pageSize] for original positions. Default: allocated. */
  readonly positions?: readonly Tensor[] | undefined
  /** float32 [pages, pageSize]: written where the cache has value norms. */
  readonly valueNorms?: readonly Tensor[] | undefined
  /** Ids of free pages, taken from the front in the order of segments: one list for all layers, or one per layer. */
  readonly freePages: Int32Array | readonly Int32Array[]
}

/**
 * To the front of each head's own rows or pages. The cache must have positions, since they move, too. It is disposed of: its
 * lengths are no longer true.
 */
export interface InPlaceTarget {
  readonly target: 'in-place'
}

/** Where kept rows go. */
export type Target = RaggedTarget | PagesTarget | InPlaceTarget

/**
 * Moves the kept rows together, in order, with their original positions.
 *
 * @returns a cache of what was kept, ready for the next eviction. Ragged: `keys(layer)` and the others are views of one buffer
 *   each. Pages: a table per head, and `pagesUsed`. In place: the same tensors with new lengths, and `freedPages`.
 * @throws LaproxError (as a rejection) `INVALID_ARGUMENT` for a selection or target that does not fit the cache, `OUT_OF_BOUNDS`
 *   for tokens or pages that do not exist, `OVERLAP` where outputs overlap each other or the cache, `OUT_OF_PAGES`, `OUT_OF_MEMORY`,
 *   `DISPOSED`, `DETACHED`, `ABORTED`. The cache is as it was then, and so are the pools.
 */
export async function compact(cache: KvCache, selection: Selection, options: CallOptions & Target = {}): Promise<KvCache> {
  const { state, section } = stateOf(cache)
  const device = handleOf(cache.device)
  const plan = planTarget(options, state)
  return call(device, options, async (hooks) => (await startCompact(device, cache, state, section, selection, plan, hooks)).cache)
}

/** Where rows go, checked: everything but the sizes, which the selection tells. */
export type Plan =
  | { readonly target: 'ragged' | 'in-place' }
  | {
      readonly target: 'pages'
      readonly keys: readonly Tensor[]
      readonly values: readonly Tensor[]
      readonly positions: readonly Tensor[]
      readonly valueNorms: readonly Tensor[] | undefined
      readonly freePages: readonly Int32Array[]
    }

/** Checks a call's target against the cache. */
export function planTarget(options: Target, state: CacheState): Plan {
  object(options, 'options', 'an object')
  const { target = 'ragged' } = options
  if (target === 'ragged') return { target }
  if (target === 'in-place') {
    if (state.positions === undefined) {
      throw new LaproxError(
        'INVALID_ARGUMENT',
        "target is 'in-place'; expected a cache with positions, since rows move: give KvCache.from `positions`",
      )
    }
    return { target }
  }
  if (target !== 'pages') {
    throw new LaproxError('INVALID_ARGUMENT', `target is ${String(target)}; ${suggest(target, ['ragged', 'pages', 'in-place'])}`)
  }
  return planPages(options as PagesTarget, state)
}

function planPages(options: PagesTarget, state: CacheState): Plan {
  const keys = tensors(options.keys, 'keys')
  const pools = keys.length
  if (pools !== 1 && pools !== state.layers) {
    throw new LaproxError('INVALID_ARGUMENT', `keys has ${pools} tensors; expected one pool for all layers, or one per layer, ${state.layers}`)
  }
  const values = tensors(options.values, 'values', pools)
  sameType(keys, 'keys', state.type)
  sameType(values, 'values', state.type)
  for (const [i, tensor] of keys.entries()) {
    shape(tensor, `keys[${i}]`, [-1, -1, state.headDim], '[pages, pageSize, d]')
    contiguousRows(tensor, `keys[${i}]`)
    if (tensor.dims[1] === 0) throw wrong(`keys[${i}]`, tensor, 'pages of at least one token')
  }
  checkPlane(values, 'values', keys, state.headDim)
  const positions =
    optionalPlane(options.positions, 'positions', keys, 'int32') ?? keys.map((tensor) => Tensor.zeros('int32', tensor.dims.slice(0, 2)))
  const valueNorms = optionalPlane(options.valueNorms, 'valueNorms', keys, 'float32')
  const lists: readonly unknown[] = Array.isArray(options.freePages) ? options.freePages : [options.freePages]
  if (lists.length !== 1 && lists.length !== state.layers) {
    throw new LaproxError('INVALID_ARGUMENT', `freePages has ${lists.length} lists; expected one for all layers, or one per layer, ${state.layers}`)
  }
  for (const [i, list] of lists.entries()) {
    if (!(list instanceof Int32Array)) throw wrong(lists.length === 1 ? 'freePages' : `freePages[${i}]`, list, 'an Int32Array of page ids')
  }
  checkApart(positions, 'positions', [...keys, ...values, ...allOf(state)])
  if (valueNorms !== undefined) checkApart(valueNorms, 'valueNorms', [...keys, ...values, ...positions, ...allOf(state)])
  return { target: 'pages', keys, values, positions, valueNorms, freePages: lists as readonly Int32Array[] }
}

function allOf(state: CacheState): Tensor[] {
  return [state.keys, state.values, state.positions ?? [], state.valueNorms ?? []].flat()
}

/** Planes of numbers share no byte with rows of keys and values; keys and values are checked row by row in native code. */
function checkApart(list: readonly Tensor[], at: string, others: readonly Tensor[]): void {
  for (const [i, tensor] of list.entries()) {
    const first = tensor.data.byteOffset + tensor.offset * elementBytes(tensor.type)
    for (const other of others) {
      if (other.data.buffer !== tensor.data.buffer) continue
      const begin = other.data.byteOffset + other.offset * elementBytes(other.type)
      if (first < begin + byteExtent(other) && begin < first + byteExtent(tensor)) {
        throw new LaproxError('OVERLAP', `${at}[${i}] shares memory with other tensors of the call; expected memory of its own`)
      }
    }
  }
}

/** What a compaction writes, and the cache that it leaves. */
interface Prepared {
  readonly target: Section
  readonly table: Float64Array
  readonly pages: Int32Array
  finish(): CacheState
}

/** Compacts, and tells how long it took on the device. */
export async function startCompact(
  device: NativeHandle,
  cache: KvCache,
  state: CacheState,
  section: Section,
  selection: Selection,
  plan: Plan,
  { progress, flag }: Hooks,
): Promise<{ readonly cache: KvCache; readonly ms: number }> {
  const kept = selectionSection(selection)
  for (const name of ['layers', 'sequences', 'kvHeads'] as const) {
    if (selection[name] !== state[name]) {
      throw new LaproxError('INVALID_ARGUMENT', `selection: ${name} is ${selection[name]}; expected that of the cache, ${state[name]}`)
    }
  }
  const prepared = prepare(plan, state, selection)
  const held: Held<undefined> = [undefined, progress, flag, ...section.buffers, ...kept.buffers, ...prepared.target.buffers]
  held.push(prepared.table, prepared.pages)
  await native().compact(device, section.numbers, kept.numbers, prepared.target.numbers, held)
  const result = cacheOf(cache.device, prepared.finish())
  if (plan.target === 'in-place') cache.dispose()
  return { cache: result, ms: prepared.table[0]! * 1000 }
}

function prepare(plan: Plan, state: CacheState, selection: Selection): Prepared {
  switch (plan.target) {
    case 'ragged':
      return prepareRagged(state, selection)
    case 'in-place':
      return prepareInPlace(state, selection)
    case 'pages':
      return preparePages(plan, state, selection)
  }
}

// The values of lpx_target.
const toRagged = 0
const toPages = 1
const toInPlace = 2

function prepareRagged(state: CacheState, selection: Selection): Prepared {
  const { type, headDim, layers } = state
  const rows = selection.entries
  const axes = axesOf('ragged', 2)
  const flat = {
    keys: newTensor(type, [rows, headDim], 'the kept keys'),
    values: newTensor(type, [rows, headDim], 'the kept values'),
    positions: newTensor('int32', [rows], 'the kept positions'),
    valueNorms: state.valueNorms && newTensor('float32', [rows], 'the kept value norms'),
  }
  const writer = new SectionWriter()
  writer.push(toRagged, 0, 1)
  for (const tensor of [flat.keys, flat.values, flat.positions, flat.valueNorms]) writePlane(writer, tensor, axes)
  writer.push(Math.max(rows, 1), 0)
  return {
    target: writer.section(),
    table: new Float64Array(1),
    pages: noPages,
    finish() {
      const lengths = selection.counts
      const segments = lengths.length / layers
      const starts = new Int32Array(lengths.length)
      const ends = selection.offsets.filter((_, i) => i % segments === 0)
      for (let i = 0; i < layers; i++) {
        starts.set(cumulative(lengths.subarray(i * segments, (i + 1) * segments)).subarray(0, segments), i * segments)
      }
      const split = (tensor: Tensor): Tensor[] => Array.from({ length: layers }, (_, i) => rowsOf(tensor, ends[i]!, ends[i + 1]!))
      return {
        ...shapeOf(state),
        kind: 'ragged',
        keys: split(flat.keys),
        values: split(flat.values),
        positions: split(flat.positions),
        valueNorms: flat.valueNorms && split(flat.valueNorms),
        lengths,
        axes,
        tables: undefined,
        starts,
      }
    },
  }
}

function prepareInPlace(state: CacheState, selection: Selection): Prepared {
  const { layers, tables } = state
  // A page that the heads share is counted for each of them here, which is enough.
  const segments = state.lengths.length / layers
  const most =
    tables === undefined
      ? 0
      : state.lengths.reduce((sum, length, i) => sum + pagesFor(length, state.keys[Math.floor(i / segments)]!.dims[state.axes.token]!), 0)
  const table = new Float64Array(1 + layers)
  const pages = allocate(Int32Array, most, 'the list of freed pages')
  return {
    target: new SectionWriter().push(toInPlace, 0, 0, 0).section(),
    table,
    pages,
    finish() {
      const freed = cumulative(Int32Array.from(table.subarray(1)))
      const { pagesUsed: _, ...kept } = state
      return {
        ...kept,
        lengths: selection.counts,
        ...(tables === undefined ? {} : { freedPages: Array.from({ length: layers }, (_, i) => pages.slice(freed[i]!, freed[i + 1]!)) }),
      }
    },
  }
}

function preparePages(plan: Plan & { readonly target: 'pages' }, state: CacheState, selection: Selection): Prepared {
  const { layers, sequences, kvHeads } = state
  const axes = axesOf('paged', 3, 'NHD')
  const perLayer = <T>(list: readonly T[]): T[] => Array.from({ length: layers }, (_, i) => list[list.length === 1 ? 0 : i]!)
  const planes = {
    keys: perLayer(plan.keys),
    values: perLayer(plan.values),
    positions: perLayer(plan.positions),
    valueNorms: plan.valueNorms && state.valueNorms && perLayer(plan.valueNorms),
  }
  const lengths = selection.counts
  const segments = sequences * kvHeads
  const pageSize = (i: number): number => planes.keys[Math.floor(i / segments)]!.dims[1]!
  const width = lengths.reduce((most, length, i) => Math.max(most, pagesFor(length, pageSize(i))), 1)
  const writer = new SectionWriter()
  writer.push(toPages, width, layers)
  for (let layer = 0; layer < layers; layer++) {
    for (const list of [planes.keys, planes.values, planes.positions, planes.valueNorms]) writePlane(writer, list?.[layer], axes)
    writer.push(planes.keys[layer]!.dims[1]!)
  }
  writer.push(plan.freePages.length, ...plan.freePages.map((list) => writer.buffer(list)))
  const table = new Float64Array(1 + plan.freePages.length)
  const pages = allocate(Int32Array, lengths.length * width, 'the page table')
  return {
    target: writer.section(),
    table,
    pages,
    finish: () => ({
      ...shapeOf(state),
      kind: 'paged',
      ...planes,
      lengths,
      axes,
      tables: Array.from(
        { length: layers },
        (_, i) => new Tensor('int32', pages.subarray(i * segments * width, (i + 1) * segments * width), [sequences, kvHeads, width]),
      ),
      starts: undefined,
      pagesUsed: Array.from(table.subarray(1)),
    }),
  }
}

const noPages = new Int32Array(0)

function pagesFor(rows: number, pageSize: number): number {
  return Math.ceil(rows / pageSize)
}

/** What a compaction does not change. A cache without positions has read as many tokens as its longest head has. */
function shapeOf({
  type,
  layers,
  sequences,
  kvHeads,
  headDim,
  positions,
  contextLengths,
  lengths,
}: CacheState): Pick<CacheState, 'type' | 'layers' | 'sequences' | 'kvHeads' | 'headDim' | 'contextLengths'> {
  const contexts = new Int32Array(sequences)
  for (const [i, length] of lengths.entries()) {
    const sequence = Math.floor(i / kvHeads) % sequences
    contexts[sequence] = Math.max(contexts[sequence]!, length)
  }
  return { type, layers, sequences, kvHeads, headDim, contextLengths: positions === undefined ? contexts : contextLengths }
}

function newTensor<T extends 'float32' | 'float16' | 'bfloat16' | 'int32'>(type: T, dims: readonly number[], at: string): Tensor<T> {
  const array = { float32: Float32Array, float16: Uint16Array, bfloat16: Uint16Array, int32: Int32Array }[type]
  const size = dims.reduce((product, dim) => product * dim, 1)
  return new Tensor(type, allocate<unknown>(array, size, at) as never, dims)
}

/** Rows [begin, end) as a tensor whose data begins there. */
function rowsOf(tensor: Tensor, begin: number, end: number): Tensor {
  const width = tensor.dims[1] ?? 1
  const data = (tensor.data as TensorDataMap['int32']).subarray(begin * width, end * width)
  return new Tensor(tensor.type, data as never, [end - begin, ...tensor.dims.slice(1)])
}
