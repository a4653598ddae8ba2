import {
  axesOf,
  type CacheState,
  cacheOf,
  checkPlane,
  cumulative,
  type KvCache,
  lazyCacheOf,
  optionalPlane,
  stateOf,
  succeed,
  writePlane,
} from './cache.js'
import { type CallOptions, call, type Hooks } from './call.js'
import { alignedRows, allocate, allocateUnset, byteExtent, contiguousRows, located, object, sameType, shape, tensors, wrong } from './check.js'
import { type Device, handleOf } from './device.js'
import { startWork } from './enqueue.js'
import { LaproxError, suggest } from './errors.js'
import { allocateOn, arrayIn, DeviceMemory } from './memory.js'
import { deviceNumbers, type Held, type NativeHandle, native, type Section, SectionWriter, stage } from './native.js'
import { type Selection, selectionOn } from './selection.js'
import { elementBytes, onDevice, placeOf, Tensor, type TensorDataMap } from './tensor.js'

/** Into new memory, flat over all layers: the kept rows of segment after segment. The default. On a GPU it belongs to the new cache. */
export interface RaggedTarget {
  /** Default. */
  readonly target?: 'ragged' | undefined
}

/** Into pages that a pool has free, each for one head of one layer and sequence. */
export interface PagesTarget {
  /** Into pages. */
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
  /** Where the rows are. */
  readonly target: 'in-place'
}

/** Where kept rows go. */
export type Target = RaggedTarget | PagesTarget | InPlaceTarget

/**
 * Moves the kept rows together, in order, with their original positions. All of it is on one device: the cache, the selection, a
 * pool of pages.
 *
 * @returns a cache of what was kept, ready for the next eviction. Ragged: `keys(layer)` and the others are views of one buffer
 *   each. Pages: a table per head, and `pagesUsed`. In place: the same tensors with new lengths, and `freedPages`.
 * @throws LaproxError (as a rejection) `INVALID_ARGUMENT` for a selection or target that does not fit the cache, `OUT_OF_BOUNDS`
 *   for tokens or pages that do not exist, `OVERLAP` where outputs overlap each other or the cache, `OUT_OF_PAGES`, `OUT_OF_MEMORY`,
 *   `DISPOSED`, `DETACHED`, `DEVICE_MISMATCH`, `DEVICE_ERROR`, `ABORTED`. The cache is as it was then, and so are the pools
 *   but for pages of `freePages`, which may have been written to.
 */
export async function compact(cache: KvCache, selection: Selection, options: CallOptions & Target = {}): Promise<KvCache> {
  const { state, section } = stateOf(cache)
  const device = handleOf(cache.device)
  const plan = planTarget(options, state, cache.device)
  return call(cache.device, options, async (hooks) =>
    cache.device.backend === 'cuda'
      ? compactOnDevice(cache, state, section, selection, plan, hooks)
      : startCompact(device, cache, state, section, selection, plan, hooks),
  )
}

async function compactOnDevice(
  cache: KvCache,
  state: CacheState,
  section: Section,
  selection: Selection,
  plan: Plan,
  hooks: Hooks,
): Promise<KvCache> {
  const kept = selectionOn(cache.device, state, selection)
  const { counts } = selection
  const preparing = prepareOnDevice(cache.device, plan, state, counts, hooks)
  const prepared = preparing instanceof Promise ? await preparing : preparing
  const keep = [state, selection, plan]
  return prepared.run(cache, (parts) =>
    startWork(handleOf(cache.device), { stages: stage.compact, cache: section, selection: kept, keep, ...parts }, hooks).then((numbers) => ({
      counted: { counts },
      numbers,
    })),
  )
}

/** Where rows go, checked: everything but the sizes, which the selection tells. */
export type Plan =
  | { readonly target: 'ragged' | 'in-place' }
  | {
      readonly target: 'pages'
      readonly keys: readonly Tensor[]
      readonly values: readonly Tensor[]
      /** Of the host they are there; on a GPU they may be yet to be allocated. */
      readonly positions: readonly Tensor[] | undefined
      readonly valueNorms: readonly Tensor[] | undefined
      readonly freePages: readonly Int32Array[]
    }

/** Checks a call's target against the cache. */
export function planTarget(options: Target, state: CacheState, device: Device): Plan {
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
  return planPages(options as PagesTarget, state, device)
}

function planPages(options: PagesTarget, state: CacheState, device: Device): Plan {
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
    alignedRows(tensor, 'keys', i)
    if (tensor.dims[1] === 0) throw wrong(`keys[${i}]`, tensor, 'pages of at least one token')
  }
  checkPlane(values, 'values', keys, state.headDim)
  let positions = optionalPlane(options.positions, 'positions', keys, 'int32')
  if (positions === undefined && device.backend === 'cpu') positions = keys.map((tensor) => Tensor.zeros('int32', tensor.dims.slice(0, 2)))
  const valueNorms = optionalPlane(options.valueNorms, 'valueNorms', keys, 'float32')
  for (const [list, at] of [
    [keys, 'keys'],
    [values, 'values'],
    [positions, 'positions'],
    [valueNorms, 'valueNorms'],
  ] as const) {
    located(list, at, device)
  }
  const lists: readonly unknown[] = Array.isArray(options.freePages) ? options.freePages : [options.freePages]
  if (lists.length !== 1 && lists.length !== state.layers) {
    throw new LaproxError('INVALID_ARGUMENT', `freePages has ${lists.length} lists; expected one for all layers, or one per layer, ${state.layers}`)
  }
  for (const [i, list] of lists.entries()) {
    if (!(list instanceof Int32Array)) throw wrong(lists.length === 1 ? 'freePages' : `freePages[${i}]`, list, 'an Int32Array of page ids')
  }
  if (positions !== undefined) checkApart(positions, 'positions', [...keys, ...values, ...allOf(state)])
  if (valueNorms !== undefined) checkApart(valueNorms, 'valueNorms', [...keys, ...values, ...(positions ?? []), ...allOf(state)])
  return { target: 'pages', keys, values, positions, valueNorms, freePages: lists as readonly Int32Array[] }
}

function allOf(state: CacheState): Tensor[] {
  return [state.keys, state.values, state.positions ?? [], state.valueNorms ?? []].flat()
}

/** Planes of numbers share no byte with rows of keys and values; keys and values are checked row by row in native code. */
function checkApart(list: readonly Tensor[], at: string, others: readonly Tensor[]): void {
  for (const [i, tensor] of list.entries()) {
    const range = rangeOf(tensor)
    for (const other of others) {
      const { memory, begin, end } = rangeOf(other)
      if (memory === range.memory && range.begin < end && begin < range.end) {
        throw new LaproxError('OVERLAP', `${at}[${i}] shares memory with other tensors of the call; expected memory of its own`)
      }
    }
  }
}

/** Bytes [begin, end) of a buffer, or of a GPU's memory. */
function rangeOf(tensor: Tensor): { memory: unknown; begin: number; end: number } {
  const place = placeOf(tensor)
  const [memory, base] = typeof place === 'number' ? [tensor.device, place] : [place.buffer, place.byteOffset]
  const begin = base + tensor.offset * elementBytes(tensor.type)
  return { memory, begin, end: begin + byteExtent(tensor) }
}

/** What a compaction on a CPU device writes, and the cache that it leaves. */
export interface Prepared {
  readonly target: Section
  /** [seconds, pages used of each list or pages freed of each layer] */
  readonly table: Float64Array
  readonly pages: Int32Array
  /** Once it is done; `counts` are the kept tokens of each segment. Ends the cache before where rows moved in it. */
  finish(counts: Int32Array): KvCache
}

/** What knows the kept tokens of each segment. */
type Counted = Pick<Selection, 'counts'>

/** A compaction on a GPU, before its selection is known. */
export interface PreparedOnDevice {
  /** Does the work, given what it writes to; gives the cache that it leaves, and ends the one before where rows moved in it. */
  run(
    cache: KvCache,
    work: (parts: { target: Section; rows?: NativeHandle; pageTable?: NativeHandle; counts: Float64Array; pages: Int32Array }) => Promise<{
      counted: Counted
      numbers: Float64Array
    }>,
  ): Promise<KvCache>
}

/** `counts` are the kept tokens of each segment, where they are known. A promise where something must be allocated first. */
export function prepareOnDevice(
  device: Device,
  plan: Plan,
  state: CacheState,
  counts: Int32Array | undefined,
  hooks: Hooks,
): PreparedOnDevice | Promise<PreparedOnDevice> {
  const { layers } = state
  switch (plan.target) {
    case 'ragged': {
      const rows: NativeHandle = {}
      return {
        async run(_, work) {
          const done = await work({ target: raggedTarget, rows, counts: noCounts, pages: noPages })
          return raggedOnDevice(device, state, done.counted, done.numbers, rows)
        },
      }
    }
    case 'in-place': {
      const most = mostFreed(state)
      const target = new SectionWriter().push(toInPlace, 0, 0, 0, most).section()
      const freed = new Float64Array(layers)
      const pages = allocate(Int32Array, most, 'the list of freed pages')
      return {
        async run(cache, work) {
          const done = await work({ target, counts: freed, pages })
          const result = cacheOf(device, thinned(state, done.counted.counts, freed, pages))
          succeed(cache)
          return result
        },
      }
    }
    case 'pages':
      return plan.positions === undefined
        ? withPositions(device, plan, hooks).then((whole) => preparePagesOnDevice(device, whole.plan, state, counts, whole.positions))
        : preparePagesOnDevice(device, plan, state, counts)
  }
}

/** The plan with positions for its pages, in new memory. */
async function withPositions(device: Device, plan: Plan & { readonly target: 'pages' }, hooks: Hooks) {
  const firsts = [0]
  for (const { dims } of plan.keys) firsts.push(firsts.at(-1)! + dims[0]! * dims[1]!)
  const positions = await allocateOn(device, firsts.at(-1)! * 4, hooks)
  const tensors = plan.keys.map(({ dims }, i) => onDevice('int32', positions, dims.slice(0, 2), { offset: firsts[i]! }))
  return { plan: { ...plan, positions: tensors }, positions }
}

function preparePagesOnDevice(
  device: Device,
  plan: Plan & { readonly target: 'pages' },
  state: CacheState,
  counts: Int32Array | undefined,
  positions?: DeviceMemory,
): PreparedOnDevice {
  const pageTable: NativeHandle = {}
  const { writer, planes, width, axes } = pagesTarget(plan, state, counts ?? state.lengths)
  const used = new Float64Array(plan.freePages.length)
  return {
    async run(_, work) {
      try {
        const done = await work({ target: writer.push(0).section(), pageTable, counts: used, pages: noPages })
        const { layers, sequences, kvHeads } = state
        const perLayer = sequences * kvHeads * width
        const table = new DeviceMemory(device, done.numbers[deviceNumbers.table]!, layers * perLayer * 4, pageTable)
        return cacheOf(device, {
          ...shapeOf(state),
          kind: 'paged',
          ...planes,
          lengths: done.counted.counts,
          axes,
          tables: Array.from({ length: layers }, (_, i) => onDevice('int32', table, [sequences, kvHeads, width], { offset: i * perLayer })),
          starts: undefined,
          pagesUsed: Array.from(used),
          owned: positions === undefined ? [table] : [table, positions],
        })
      } catch (error) {
        positions?.dispose()
        throw error
      }
    },
  }
}

/** The cache of rows that a call has left in new memory. */
function raggedOnDevice(device: Device, state: CacheState, counted: Counted, numbers: Float64Array, handle: NativeHandle): KvCache {
  const { type, headDim } = state
  const base = numbers[deviceNumbers.keys]!
  const norms = numbers[deviceNumbers.valueNorms]!
  const integers = numbers[deviceNumbers.positions]!
  const entries = numbers[deviceNumbers.rows]!
  const memory = new DeviceMemory(device, base, (norms === 0 ? integers : norms) - base + entries * 4, handle)
  const plane = (of: TensorTypeOfRows, address: number, width: number): PlaneOnDevice => ({
    memory,
    type: of,
    first: (address - base) / elementBytes(of),
    width,
  })
  const planes = {
    keys: plane(type, base, headDim),
    values: plane(type, numbers[deviceNumbers.values]!, headDim),
    positions: plane('int32', integers, 0),
    valueNorms: norms === 0 ? undefined : plane('float32', norms, 0),
  }
  return raggedCache(device, state, entries, counted, planes, rowsOnDevice, [memory])
}

/** Rows of some width, 0 for numbers, in a call's new memory. */
interface PlaneOnDevice {
  readonly memory: DeviceMemory
  readonly type: TensorTypeOfRows
  /** Where they begin, in elements. */
  readonly first: number
  readonly width: number
}

function rowsOnDevice({ memory, type, first, width }: PlaneOnDevice, begin: number, end: number): Tensor {
  const rows = end - begin
  const offset = rows === 0 ? 0 : first + begin * Math.max(width, 1)
  return onDevice(type, memory, width === 0 ? [rows] : [rows, width], { offset }) as Tensor
}

/**
 * What is left of a cache, as rows. Its tensors, four a layer, are made when somebody asks for them, by `rowsOf(plane, begin, end)`. No closure is
 * handed over: one would hold on to the cache before.
 */
function raggedCache<Plane>(
  device: Device,
  state: CacheState,
  entries: number,
  counted: Counted,
  planes: { readonly keys: Plane; readonly values: Plane; readonly positions: Plane; readonly valueNorms: Plane | undefined },
  rowsOf: (plane: Plane, begin: number, end: number) => Tensor,
  owned?: readonly DeviceMemory[],
): KvCache {
  const { type, layers, sequences, kvHeads, headDim, contextLengths } = state
  // Not the state, whose tensors are those of the cache before.
  const before = { type, layers, sequences, kvHeads, headDim, contextLengths, lengths: state.lengths, positions: state.positions?.length }
  return lazyCacheOf(device, { kind: 'ragged', type, layers, sequences, kvHeads, headDim, entries, owned }, () => {
    const lengths = counted.counts
    const { starts, ends } = rowsOfLayers(lengths, layers)
    const split = (plane: Plane): Tensor[] => ends.slice(1).map((end, i) => rowsOf(plane, ends[i]!, end))
    return {
      ...shapeOf(before),
      kind: 'ragged',
      keys: split(planes.keys),
      values: split(planes.values),
      positions: split(planes.positions),
      valueNorms: planes.valueNorms && split(planes.valueNorms),
      lengths,
      axes: axesOf('ragged', 2),
      tables: undefined,
      starts,
      ...(owned === undefined ? {} : { owned }),
    }
  })
}

type TensorTypeOfRows = 'float32' | 'float16' | 'bfloat16' | 'int32'

/** Rows of a ragged cache: where each segment begins in its layer, and where layers begin and end. */
function rowsOfLayers(lengths: Int32Array, layers: number): { starts: Int32Array; ends: number[] } {
  const segments = lengths.length / layers
  const starts = new Int32Array(lengths.length)
  const ends = [0]
  let end = 0
  for (let i = 0; i < lengths.length; i++) {
    starts[i] = end - ends[ends.length - 1]!
    end += lengths[i]!
    if ((i + 1) % segments === 0) ends.push(end)
  }
  return { starts, ends }
}

const noCounts = new Float64Array(0)

async function startCompact(
  device: NativeHandle,
  cache: KvCache,
  state: CacheState,
  section: Section,
  selection: Selection,
  plan: Plan,
  { progress, flag }: Hooks,
): Promise<KvCache> {
  const kept = selectionOn(cache.device, state, selection)
  const { target, table, pages, finish } = prepareOnHost(cache, plan, state, selection.entries, selection.counts)
  const held: Held<undefined> = [undefined, progress, flag, ...section.buffers, ...kept.buffers, ...target.buffers, table, pages]
  await native().compact(device, section.numbers, kept.numbers, target.numbers, held)
  return finish(selection.counts)
}

/** For at most `rows` kept tokens, and of each segment at most `lengths`. */
export function prepareOnHost(cache: KvCache, plan: Plan, state: CacheState, rows: number, lengths: Int32Array): Prepared {
  switch (plan.target) {
    case 'ragged':
      return prepareRagged(cache.device, state, rows)
    case 'in-place':
      return prepareInPlace(cache, state)
    case 'pages':
      return preparePages(cache.device, plan, state, lengths)
  }
}

// The values of lpx_target.
const toRagged = 0
const toPages = 1
const toInPlace = 2

/** Of a GPU: its memory is the call's own. */
const raggedTarget: Section = new SectionWriter().push(toRagged, 0, 0, 0, 0).section()

function prepareRagged(device: Device, state: CacheState, rows: number): Prepared {
  const { type, headDim } = state
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
    finish: (counts) =>
      raggedCache(
        device,
        state,
        counts.reduce((sum, count) => sum + count, 0),
        { counts },
        flat,
        rowsOf,
      ),
  }
}

function prepareInPlace(cache: KvCache, state: CacheState): Prepared {
  const table = new Float64Array(1 + state.layers)
  const pages = allocate(Int32Array, mostFreed(state), 'the list of freed pages')
  return {
    target: new SectionWriter().push(toInPlace, 0, 0, 0).section(),
    table,
    pages,
    finish(lengths) {
      const result = cacheOf(cache.device, thinned(state, lengths, table.subarray(1), pages))
      succeed(cache)
      return result
    },
  }
}

/** How many pages an in-place compaction may free at most. A page that the heads share is counted for each of them, which is enough. */
function mostFreed({ layers, tables, lengths, keys, axes }: CacheState): number {
  if (tables === undefined) return 0
  const segments = lengths.length / layers
  return lengths.reduce((sum, length, i) => sum + pagesFor(length, keys[Math.floor(i / segments)]!.dims[axes.token]!), 0)
}

/** The cache whose rows have moved to the front of each segment; `counts` are of the freed pages of each layer. */
function thinned(state: CacheState, lengths: Int32Array, counts: Float64Array, pages: Int32Array): CacheState {
  const { pagesUsed: _, ...kept } = state
  if (state.tables === undefined) return { ...kept, lengths }
  const freed = cumulative(Int32Array.from(counts))
  return { ...kept, lengths, freedPages: Array.from({ length: state.layers }, (_, i) => pages.slice(freed[i]!, freed[i + 1]!)) }
}

function preparePages(device: Device, plan: Plan & { readonly target: 'pages' }, state: CacheState, most: Int32Array): Prepared {
  const { layers, sequences, kvHeads } = state
  const { writer, planes, width, axes } = pagesTarget(plan, state, most)
  const segments = sequences * kvHeads
  const table = new Float64Array(1 + plan.freePages.length)
  const pages = newTensor('int32', [most.length * width], 'the page table').data
  return {
    target: writer.section(),
    table,
    pages,
    finish: (lengths) =>
      cacheOf(device, {
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

/** New pages for segments of at most these lengths. */
function pagesTarget(plan: Plan & { readonly target: 'pages' }, state: CacheState, lengths: Int32Array) {
  const { layers, sequences, kvHeads } = state
  const axes = axesOf('paged', 3, 'NHD')
  const perLayer = <T>(list: readonly T[]): T[] => Array.from({ length: layers }, (_, i) => list[list.length === 1 ? 0 : i]!)
  const planes = {
    keys: perLayer(plan.keys),
    values: perLayer(plan.values),
    positions: perLayer(plan.positions!),
    valueNorms: plan.valueNorms && state.valueNorms && perLayer(plan.valueNorms),
  }
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
  return { writer, planes, width, axes }
}

const noPages = new Int32Array(0)

function pagesFor(rows: number, pageSize: number): number {
  return Math.ceil(rows / pageSize)
}

/** What a compaction does not change. */
type Unchanged = Pick<CacheState, 'type' | 'layers' | 'sequences' | 'kvHeads' | 'headDim' | 'contextLengths'>

/** A cache without positions has read as many tokens as its longest head has. */
function shapeOf({
  type,
  layers,
  sequences,
  kvHeads,
  headDim,
  positions,
  contextLengths,
  lengths,
}: Unchanged & Pick<CacheState, 'lengths'> & { readonly positions: unknown }): Unchanged {
  if (positions !== undefined) return { type, layers, sequences, kvHeads, headDim, contextLengths }
  const contexts = new Int32Array(sequences)
  for (let i = 0; i < lengths.length; i++) {
    const sequence = Math.floor(i / kvHeads) % sequences
    if (lengths[i]! > contexts[sequence]!) contexts[sequence] = lengths[i]!
  }
  return { type, layers, sequences, kvHeads, headDim, contextLengths: contexts }
}

/** For rows, and page tables, that are all written: its data are what the memory happens to hold, since zeros would cost the JavaScript thread milliseconds. */
function newTensor<T extends 'float32' | 'float16' | 'bfloat16' | 'int32'>(type: T, dims: readonly number[], at: string): Tensor<T> {
  const array = { float32: Float32Array, float16: Uint16Array, bfloat16: Uint16Array, int32: Int32Array }[type]
  const size = dims.reduce((product, dim) => product * dim, 1)
  return new Tensor(type, arrayIn<ArrayBufferView>(array, size, (bytes) => allocateUnset(bytes, at)) as never, dims)
}

/** Rows [begin, end) as a tensor whose data begins there. */
function rowsOf(tensor: Tensor, begin: number, end: number): Tensor {
  const width = tensor.dims[1] ?? 1
  const data = (tensor.data as TensorDataMap['int32']).subarray(begin * width, end * width)
  return new Tensor(tensor.type, data as never, [end - begin, ...tensor.dims.slice(1)])
}
