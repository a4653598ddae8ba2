import { type CacheState, type Integers, integers, type KvCache, stateOf } from './cache.js'
import { type CallOptions, call, type Hooks } from './call.js'
import { allocate, integer, object, wrong } from './check.js'
import { type Device, handleOf } from './device.js'
import { startWork } from './enqueue.js'
import { LaproxError } from './errors.js'
import { DeviceMemory } from './memory.js'
import { type AttentionModel, handleOfModel, projectionsOf } from './model.js'
import { deviceNumbers, holding, type NativeHandle, native, type Section, SectionWriter, stage } from './native.js'
import type { Policy } from './policy.js'
import { type Rules, rulesOf } from './rules.js'
import { elementBytes, onDevice, placeOf, Tensor } from './tensor.js'
import { type Window, windowSection } from './window.js'

/** Scores that come from elsewhere. Segments are numbered (layer * sequences + sequence) * kvHeads + head. */
export interface ScoresDescription {
  /** L. */
  readonly layers: number
  /** S. Default 1. */
  readonly sequences?: number | undefined
  /** G. */
  readonly kvHeads: number
  /** [segments] scores of each. */
  readonly lengths: Integers
  /** The scores of all segments, one after the other: not copied. */
  readonly data: Float32Array
  /** Original position of each score, laid out as `data`, ascending in each segment: not copied. Default: the index in the segment. */
  readonly positions?: Int32Array | undefined
  /** [S] tokens that each sequence has read. Required with `positions`. */
  readonly contextLengths?: Integers | undefined
  /** Of one key and one value row: for budgets in bytes. */
  readonly bytesPerEntry?: number | undefined
}

/** What native code reads of scores; throws `DETACHED` where their memory is gone. */
export let sectionOf: (scores: Scores) => Section
/** Scores over given arrays, unchecked. */
let scoresOf: (shape: Shape, data: Float32Array | OnDevice, lengths: Int32Array, rest: Rest) => Scores

/**
 * One score per entry of a cache, larger is worth more. A *segment* is one (layer, sequence, KV head); segments are numbered
 * (layer * sequences + sequence) * kvHeads + head. Writing to `data` changes the scores.
 *
 * Scores that a GPU has computed stay in its memory, where {@link select} ranks them: {@link Scores.to} copies them, and
 * {@link Scores.tensor} is where they are. Dispose of those, or let the garbage collector.
 */
export class Scores implements Disposable {
  /** L. */
  readonly layers: number
  /** S. */
  readonly sequences: number
  /** G. */
  readonly kvHeads: number
  /** [segments] scores of each. */
  readonly lengths: Int32Array
  /** [segments + 1] where each begins in `data`. */
  readonly offsets: Float64Array
  /** [S] tokens that each sequence has read; there with `positions`. */
  readonly contextLengths: Int32Array | undefined
  /** Of one key and one value row; 0 where nobody said. */
  readonly bytesPerEntry: number
  readonly #data: Float32Array | OnDevice
  readonly #positions: Int32Array | undefined
  readonly #section: Section | undefined
  readonly #seconds: Float64Array | undefined

  private constructor(shape: Shape, data: Float32Array | OnDevice, lengths: Int32Array, rest: Rest) {
    this.layers = shape.layers
    this.sequences = shape.sequences
    this.kvHeads = shape.kvHeads
    this.#data = data
    this.lengths = lengths
    this.#positions = rest.positions
    this.contextLengths = rest.contextLengths
    this.bytesPerEntry = rest.bytesPerEntry
    this.#seconds = rest.seconds
    this.offsets = new Float64Array(lengths.length + 1)
    for (let i = 0; i < lengths.length; i++) this.offsets[i + 1] = this.offsets[i]! + lengths[i]!
    if (!(data instanceof Float32Array)) return
    const buffers: ArrayBufferView[] = [lengths, data]
    if (rest.positions !== undefined && rest.contextLengths !== undefined) buffers.push(rest.positions, rest.contextLengths)
    const [positions, contexts] = buffers.length > 2 ? [2, 3] : [-1, -1]
    this.#section = {
      numbers: Float64Array.of(buffers.length, shape.layers, shape.sequences, shape.kvHeads, rest.bytesPerEntry, 0, 1, positions, contexts),
      buffers,
    }
  }

  static {
    scoresOf = (shape, data, lengths, rest) => new Scores(shape, data, lengths, rest)
    sectionOf = (scores) => {
      if (!(scores instanceof Scores)) throw wrong('scores', scores, 'Scores')
      const count = scores.offsets[scores.offsets.length - 1]!
      const data = scores.#data
      if (!(data instanceof Float32Array)) return deviceSection(scores, data)
      if (data.length !== count || (scores.#positions !== undefined && scores.#positions.length !== count)) {
        throw new LaproxError('DETACHED', 'the buffer of the scores has been detached: it was transferred elsewhere')
      }
      return scores.#section!
    }
  }

  /** Where they are. */
  get location(): 'cpu' | 'cuda' {
    return this.#data instanceof Float32Array ? 'cpu' : 'cuda'
  }

  /** The GPU that has them; undefined for host memory. */
  get device(): Device | undefined {
    return this.#data instanceof Float32Array ? undefined : this.#data.scores.device
  }

  /** [count] in host memory, the segments one after the other; [segments, stride] on a GPU, the scores of a segment first in its row. */
  get tensor(): Tensor<'float32'> {
    return this.#data instanceof Float32Array ? new Tensor('float32', this.#data, [this.#data.length]) : this.#data.scores
  }

  /**
   * The scores of all segments, one after the other. Not pooled: pooling belongs to the selection.
   *
   * @throws LaproxError `DEVICE_MISMATCH` where they are in the memory of a GPU: see {@link Scores.to}
   */
  get data(): Float32Array {
    if (this.#data instanceof Float32Array) return this.#data
    throw onlyOnDevice('data', this.#data)
  }

  /**
   * Original position of each score, laid out as `data`; undefined: the index in the segment.
   *
   * @throws LaproxError `DEVICE_MISMATCH` where they are in the memory of a GPU: see {@link Scores.to}
   */
  get positions(): Int32Array | undefined {
    if (this.#data instanceof Float32Array || this.#data.positions === undefined) return this.#positions
    throw onlyOnDevice('positions', this.#data)
  }

  /**
   * The same scores on a device, or in host memory: themselves where they are there, else a copy.
   *
   * @throws LaproxError (as a rejection) as {@link Tensor.to}
   */
  async to(device: Device | 'cpu', options?: CallOptions): Promise<Scores> {
    const { lengths, contextLengths, bytesPerEntry } = this
    const rest = { contextLengths, bytesPerEntry }
    const count = this.offsets[lengths.length]!
    if (this.#data instanceof Float32Array) {
      if (device === 'cpu' || device.backend === 'cpu') return this
      let stride = 4
      for (const length of lengths) stride = Math.max(stride, Math.ceil(length / 4) * 4)
      const rows = [new Float32Array(lengths.length * stride), this.#positions && new Int32Array(lengths.length * stride)] as const
      this.#eachRow(stride, (x, row, packed) => {
        rows[0].set(this.data.subarray(packed, packed + lengths[x]!), row)
        rows[1]?.set(this.#positions!.subarray(packed, packed + lengths[x]!), row)
      })
      const dims = [lengths.length, stride]
      const scores = await new Tensor('float32', rows[0], dims).to(device, options)
      const positions = rows[1] && (await new Tensor('int32', rows[1], dims).to(device, options))
      return new Scores(this, { scores, positions }, lengths.slice(), { ...rest, positions: undefined })
    }
    const from = this.#data
    if (device !== 'cpu' && device === from.scores.device) return this
    const scores = await (await from.scores.to(device, options)).getData()
    const positions = from.positions && (await (await from.positions.to(device, options)).getData())
    const data = allocate(Float32Array, count, 'the scores')
    const places = positions && allocate(Int32Array, count, 'the positions of the scores')
    this.#eachRow(from.scores.dims[1]!, (x, row, packed) => {
      data.set(scores.subarray(row, row + lengths[x]!), packed)
      places?.set(positions!.subarray(row, row + lengths[x]!), packed)
    })
    return new Scores(this, data, lengths.slice(), { ...rest, positions: places })
  }

  #eachRow(stride: number, copy: (segment: number, row: number, packed: number) => void): void {
    for (let x = 0; x < this.lengths.length; x++) copy(x, x * stride, this.offsets[x]!)
  }

  /** Gives scores in the memory of a GPU back, once the calls that use them have ended. Doing it twice is no error. */
  dispose(): void {
    if (this.#data instanceof Float32Array) return
    this.#data.memory?.dispose()
    this.#data.scores.dispose()
    this.#data.positions?.dispose()
  }

  /** What `using` calls: {@link Scores.dispose}. */
  [Symbol.dispose](): void {
    this.dispose()
  }

  /**
   * Scores that come from elsewhere, to be ranked by {@link select}.
   *
   * @throws LaproxError `INVALID_ARGUMENT` for arrays that do not fit together
   */
  static from(description: ScoresDescription): Scores {
    object(description, 'description', 'an object with layers, kvHeads, lengths and data')
    const layers = integer(description.layers, 'layers', 1)
    const sequences = description.sequences === undefined ? 1 : integer(description.sequences, 'sequences', 1)
    const kvHeads = integer(description.kvHeads, 'kvHeads', 1)
    const lengths = integers(description.lengths, 'lengths')
    if (lengths.length !== layers * sequences * kvHeads) {
      throw new LaproxError('INVALID_ARGUMENT', `lengths has ${lengths.length} numbers; expected one per segment, ${layers * sequences * kvHeads}`)
    }
    let count = 0
    for (const length of lengths) count += length
    const { data, positions } = description
    checkArray(data, 'data', Float32Array, count)
    if (positions !== undefined) checkArray(positions, 'positions', Int32Array, count)
    const contextLengths = description.contextLengths === undefined ? undefined : integers(description.contextLengths, 'contextLengths')
    if (positions !== undefined && contextLengths === undefined) {
      throw wrong('contextLengths', undefined, 'the tokens that each sequence has read so far [S], since there are positions')
    }
    if (contextLengths !== undefined && contextLengths.length !== sequences) {
      throw new LaproxError('INVALID_ARGUMENT', `contextLengths has ${contextLengths.length} numbers; expected one per sequence, ${sequences}`)
    }
    const { bytesPerEntry = 0 } = description
    return new Scores({ layers, sequences, kvHeads }, data, lengths, {
      positions,
      contextLengths,
      bytesPerEntry: integer(bytesPerEntry, 'bytesPerEntry', 0, Number.MAX_SAFE_INTEGER),
    })
  }

  /** Milliseconds that scoring took on the device; 0 for scores that come from elsewhere. */
  get ms(): number {
    return (this.#seconds?.[0] ?? 0) * 1000
  }

  /**
   * The scores of one segment: a view.
   *
   * @throws LaproxError `OUT_OF_BOUNDS`
   */
  segment(layer: number, sequence: number, head: number): Float32Array {
    const x = segmentIndex(this, layer, sequence, head)
    return this.data.subarray(this.offsets[x]!, this.offsets[x + 1]!)
  }
}

/** Scores in the memory of a GPU, [segments, stride]. */
interface OnDevice {
  readonly scores: Tensor<'float32'>
  readonly positions: Tensor<'int32'> | undefined
  /** Where both are. */
  readonly memory?: DeviceMemory
}

function onlyOnDevice(what: string, { scores }: OnDevice): LaproxError {
  return new LaproxError(
    'DEVICE_MISMATCH',
    `the ${what} of the scores are in the memory of ${scores.device!.name}: copy them first, by await scores.to('cpu')`,
  )
}

function deviceSection(shape: Scores, { scores, positions }: OnDevice): Section {
  const writer = new SectionWriter()
  writer.push(shape.layers, shape.sequences, shape.kvHeads, shape.bytesPerEntry, scores.dims[1]!)
  writer.push(writer.buffer(shape.lengths), positions === undefined ? -1 : writer.buffer(shape.contextLengths))
  placeOf(scores)
  return writer.place(scores).place(positions).section()
}

/** How many segments there are, and how they are numbered. */
export interface Shape {
  readonly layers: number
  readonly sequences: number
  readonly kvHeads: number
}

interface Rest {
  readonly positions: Int32Array | undefined
  readonly contextLengths: Int32Array | undefined
  readonly bytesPerEntry: number
  readonly seconds?: Float64Array
}

/** The number of a segment; throws `OUT_OF_BOUNDS`. */
export function segmentIndex(shape: Shape, layer: number, sequence: number, head: number): number {
  const { layers, sequences, kvHeads } = shape
  if (!(inside(layer, layers) && inside(sequence, sequences) && inside(head, kvHeads))) {
    throw new LaproxError(
      'OUT_OF_BOUNDS',
      `(layer, sequence, head) is (${layer}, ${sequence}, ${head}); expected each below (${layers}, ${sequences}, ${kvHeads})`,
    )
  }
  return (layer * sequences + sequence) * kvHeads + head
}

function inside(index: number, size: number): boolean {
  return Number.isInteger(index) && index >= 0 && index < size
}

/** Checks a typed array that native code is to use. */
export function checkArray<T extends Float32Array | Int32Array>(
  array: T,
  at: string,
  type: { new (): T; readonly name: string },
  count: number,
): void {
  const { resizable, growable } = (array?.buffer ?? {}) as { readonly resizable?: boolean; readonly growable?: boolean }
  if (!(array instanceof type) || array.length !== count || resizable || growable) {
    throw wrong(at, array, `${type.name}(${count}) over a buffer of fixed length`)
  }
}

/** The checked arguments of a call that scores a cache. */
export interface ScoreInputs {
  readonly owner: Device
  readonly device: NativeHandle
  readonly model: NativeHandle
  readonly state: CacheState
  readonly cache: Section
  readonly window: Section
  readonly rules: Rules
}

/** A model and a cache that fit each other, for native code. */
export function modelWithCache(model: AttentionModel, cache: KvCache): { model: NativeHandle; state: CacheState; cache: Section } {
  const handle = handleOfModel(model)
  const { state, section } = stateOf(cache)
  if (cache.device !== model.device) {
    throw new LaproxError('DEVICE_MISMATCH', 'the cache is described to another device than the model; expected one device for both')
  }
  for (const name of ['layers', 'kvHeads', 'headDim'] as const) {
    if (state[name] !== model[name]) {
      throw new LaproxError('INVALID_ARGUMENT', `cache: ${name} is ${state[name]}; expected that of the model, ${model[name]}`)
    }
  }
  return { model: handle, state, cache: section }
}

export function scoreInputs(model: AttentionModel, cache: KvCache, window: Window | null | undefined, policy: Policy): ScoreInputs {
  const { model: handle, state, cache: section } = modelWithCache(model, cache)
  const rules = rulesOf(policy)
  checkWeights(rules.policy, state.layers)
  if (model.device.backend === 'cuda') checkSharing(rules.policy, state)
  return {
    owner: model.device,
    device: handleOf(model.device),
    model: handle,
    state,
    cache: section,
    window: holding(windowSection(window, rules.policy.window, rules.needsWindow, model, state), rules.readsProjections ? projectionsOf(model) : []),
    rules,
  }
}

function checkWeights({ layerWeights }: Policy, layers: number): void {
  if (layerWeights !== undefined && layerWeights.length !== layers) {
    throw new LaproxError('INVALID_ARGUMENT', `policy: layerWeights has ${layerWeights.length} numbers; expected one per layer, ${layers}`)
  }
}

/** What the core checks on a CPU device, where it sees the lengths. */
function checkSharing({ score }: Policy, { kvHeads, lengths, sequences }: CacheState): void {
  if (score.statistic !== 'factored' || score.sharing !== 'layer') return
  for (const [i, length] of lengths.entries()) {
    const first = lengths[i - (i % kvHeads)]!
    if (length === first) continue
    const layer = Math.floor(i / kvHeads / sequences)
    throw new LaproxError(
      'INVALID_ARGUMENT',
      `layer-wide sharing needs heads of equal length; head ${i % kvHeads} of layer ${layer} has ${length} tokens, head 0 has ${first}`,
    )
  }
}

/**
 * The score of every entry of a cache by a policy's rule, in float32, with the policy's layer weights. `select` ranks them;
 * {@link evict} and {@link selectFrom} do not need this step and are faster without it.
 *
 * @param window may be null for policies that look at no query
 * @throws LaproxError (as a rejection) `INVALID_ARGUMENT`, `OUT_OF_BOUNDS`, `UNSUPPORTED` for a policy that needs projections which
 *   the model lacks, `OUT_OF_MEMORY`, `NON_FINITE`, `DISPOSED`, `DETACHED`, `DEVICE_MISMATCH`, `ABORTED`
 */
export async function score(model: AttentionModel, cache: KvCache, window: Window | null, policy: Policy, options?: CallOptions): Promise<Scores> {
  const inputs = scoreInputs(model, cache, window, policy)
  return call(inputs.owner, options, (hooks) => (inputs.owner.backend === 'cuda' ? startScoreOnDevice(inputs, hooks) : startScore(inputs, hooks)))
}

async function startScoreOnDevice(inputs: ScoreInputs, hooks: Hooks): Promise<Scores> {
  const { owner, device, model, state, cache, window, rules } = inputs
  const scored: NativeHandle = {}
  const numbers = await startWork(device, { stages: stage.score, model, cache, window, scoreRule: rules.score, scored, keep: inputs }, hooks)
  const dims = [state.lengths.length, numbers[deviceNumbers.stride]!]
  const count = dims[0]! * dims[1]!
  const positioned = state.positions !== undefined
  const memory = new DeviceMemory(owner, numbers[deviceNumbers.scores]!, (positioned ? 2 : 1) * count * 4, scored)
  const positions = positioned ? onDevice('int32', memory, dims, { offset: count }) : undefined
  return scoresOf(state, { scores: onDevice('float32', memory, dims, {}), positions, memory }, state.lengths.slice(), {
    positions: undefined,
    contextLengths: positions && state.contextLengths?.slice(),
    bytesPerEntry: 2 * state.headDim * elementBytes(state.type),
  })
}

const noPositions = new Int32Array(0)

function startScore({ model, state, cache, window, rules }: ScoreInputs, { progress, flag }: Hooks): Promise<Scores> {
  const entries = state.lengths.reduce((sum, length) => sum + length, 0)
  const data = allocate(Float32Array, entries, 'the scores')
  const positions = state.positions === undefined ? undefined : allocate(Int32Array, entries, 'the positions of the scores')
  const seconds = new Float64Array(1)
  const scores = scoresOf(state, data, state.lengths.slice(), {
    positions,
    contextLengths: positions && state.contextLengths?.slice(),
    bytesPerEntry: 2 * state.headDim * elementBytes(state.type),
    seconds,
  })
  const outputs = [data, positions ?? noPositions, seconds]
  return native().score(model, cache.numbers, window.numbers, rules.score, [scores, progress, flag, ...cache.buffers, ...window.buffers, ...outputs])
}
