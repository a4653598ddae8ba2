/**
 * KV caches of onnxruntime-node sessions: `import { cacheFrom, rectangularFeeds } from 'laprox/onnxruntime'`.
 *
 * | graph | its past | after an eviction |
 * |---|---|---|
 * | exported by optimum or onnxruntime-genai | `past_key_values.%d.key`, `.value`: [S, G, rows, d], as many rows in each layer and head | {@link rectangularFeeds}, by a policy of scope `head` |
 * | one that takes a mask per head | `past_key.%d`, `past_value.%d`: [G, rows, d], `past_mask.%d`: [G, rows] | {@link PaddedPast}, by any policy |
 *
 * In names, `%d` is the layer, as in genai_config.json. Tensors are float32 or float16, in host memory.
 *
 * @module laprox/onnxruntime
 */
import { Tensor as OnnxTensor } from 'onnxruntime-node'
import { axesOf, type CacheState, cacheOf, KvCache, stateOf } from './cache.js'
import { integer } from './check.js'
import type { Device } from './device.js'
import { closest, LaproxError, show } from './errors.js'
import { type FloatType, Tensor, type TensorDataMap } from './tensor.js'

/** Tensors by the names that a graph gives them: what `session.run` takes and gives. */
export type OnnxTensors = Readonly<Record<string, OnnxTensor>>

/** What a graph calls the keys and values of its layers; `%d` is the layer. */
export interface LayerNames {
  /** Such as `present.%d.key`. */
  readonly key: string
  /** Such as `present.%d.value`. */
  readonly value: string
}

const present: LayerNames = { key: 'present.%d.key', value: 'present.%d.value' }
const past: LayerNames = { key: 'past_key_values.%d.key', value: 'past_key_values.%d.value' }

/** What {@link cacheFrom} takes. */
export interface CacheFromOptions {
  /** Default: `present.%d.key` and `present.%d.value`, or `past_key_values.%d.key` and `past_key_values.%d.value`. */
  readonly names?: LayerNames | undefined
  /** int64 or int32 [S, n]: the mask that the tokens were read with, 0 before and after those of a sequence. Default: no padding. */
  readonly attentionMask?: OnnxTensor | undefined
}

/**
 * The cache that a session has given, or would be fed: nothing is copied, so leave the tensors as they are while it is used.
 *
 *     const outputs = await session.run({ input_ids, attention_mask, position_ids, ... })
 *     const cache = cacheFrom(device, outputs, { attentionMask: attention_mask })
 *
 * @param device a CPU device
 * @param tensors keys and values of all layers, [S, G, n, d] each, or [G, n, d]; others are of no account
 * @throws LaproxError `INVALID_ARGUMENT` for tensors that are missing (with the closest name there is) or do not fit together,
 *   `DEVICE_MISMATCH` for tensors that are not in host memory
 */
export function cacheFrom(device: Device, tensors: OnnxTensors, { names, attentionMask }: CacheFromOptions = {}): KvCache {
  const used = names ?? ([present, past].find(({ key }) => nameOf(key, 0) in tensors) || present)
  const [keys, values] = [layersOf(tensors, used.key), layersOf(tensors, used.value)]
  const cache = KvCache.from(device, { keys, values })
  if (attentionMask === undefined) return cache
  const { begins, lengths } = runs(attentionMask, cache.sequences, keys[0]!.dims.at(-2)!)
  if (begins.every((begin) => begin === 0)) return KvCache.from(device, { keys, values, lengths })
  return withoutPadding(device, stateOf(cache).state, begins, lengths)
}

/** The tensors of the layers from 0 on, as many as there are. */
function layersOf(tensors: OnnxTensors, name: string): Tensor[] {
  const layers: Tensor[] = []
  for (let tensor = tensors[nameOf(name, 0)]; tensor !== undefined; tensor = tensors[nameOf(name, layers.length)]) {
    layers.push(view(tensor, nameOf(name, layers.length)))
  }
  if (layers.length > 0) return layers
  throw missing(tensors, nameOf(name, 0))
}

function missing(tensors: OnnxTensors, wanted: string): LaproxError {
  const near = closest(wanted, Object.keys(tensors))
  const hint = near === undefined ? `there are ${Object.keys(tensors).slice(0, 8).map(show).join(', ')}.` : `did you mean '${near}'?`
  return new LaproxError('INVALID_ARGUMENT', `there is no tensor '${wanted}'; ${hint} Other names go into the option names`)
}

function nameOf(name: string, layer: number): string {
  if (!name.includes('%d')) throw new LaproxError('INVALID_ARGUMENT', `names: '${name}' has no %d; expected it where the layer's number stands`)
  return name.replace('%d', String(layer))
}

/** ONNX Runtime's tensor as laprox's, over the same memory. */
function view(tensor: OnnxTensor, name: string): Tensor<'float32' | 'float16'> {
  const { type, dims, location } = tensor
  if (type !== 'float32' && type !== 'float16') {
    throw new LaproxError('INVALID_ARGUMENT', `${name} is ${type} ${show(dims)}; expected float32 or float16`)
  }
  if (location !== 'cpu' && location !== 'cpu-pinned') {
    throw new LaproxError('DEVICE_MISMATCH', `${name} is in '${location}'; expected 'cpu', which is the session's preferredOutputLocation by default`)
  }
  return new Tensor(type, tensor.data as Float32Array, dims)
}

/** Where the tokens of each sequence begin in its row of a mask, and how many there are. */
function runs(mask: OnnxTensor, sequences: number, tokens: number): { begins: Int32Array; lengths: Int32Array } {
  const { type, dims } = mask
  if ((type !== 'int64' && type !== 'int32') || dims.length !== 2 || dims[0] !== sequences || dims[1] !== tokens) {
    const expected = `int64 or int32 [S, n] = [${sequences}, ${tokens}]`
    throw new LaproxError('INVALID_ARGUMENT', `attentionMask is ${type} ${show(dims)}; expected ${expected}`)
  }
  const [begins, lengths] = [new Int32Array(sequences), new Int32Array(sequences)]
  for (let s = 0; s < sequences; s++) {
    const row = Array.from((mask.data as BigInt64Array).subarray(s * tokens, (s + 1) * tokens), Number)
    const begin = row.indexOf(1)
    const end = row.lastIndexOf(1) + 1
    if (row.some((seen, i) => seen !== (i >= begin && i < end ? 1 : 0))) {
      throw new LaproxError('INVALID_ARGUMENT', `attentionMask: row ${s} is no run of ones among zeros, which is what padding looks like`)
    }
    begins[s] = Math.max(begin, 0)
    lengths[s] = end - begins[s]!
  }
  return { begins, lengths }
}

/** A contiguous cache whose sequences begin later: its rows, each head from its own first one on. Token t of a head is at position t. */
function withoutPadding(device: Device, state: CacheState, begins: Int32Array, lengths: Int32Array): KvCache {
  const { sequences, kvHeads, headDim } = state
  const rows = (tensor: Tensor): Tensor => new Tensor(tensor.type, tensor.data as Float32Array, [tensor.size / headDim, headDim])
  const perHead = (of: (layer: number, sequence: number, head: number) => number): Int32Array =>
    Int32Array.from(state.lengths, (_, x) => of(Math.floor(x / (sequences * kvHeads)), Math.floor(x / kvHeads) % sequences, x % kvHeads))
  return cacheOf(device, {
    ...state,
    kind: 'ragged',
    keys: state.keys.map(rows),
    values: state.values.map(rows),
    axes: axesOf('ragged', 2),
    lengths: perHead((_, sequence) => lengths[sequence]!),
    starts: perHead((layer, sequence, head) => (sequence * kvHeads + head) * state.keys[layer]!.dims.at(-2)! + begins[sequence]!),
  })
}

/** What {@link rectangularFeeds} takes. */
export interface RectangularOptions {
  /** Default: `past_key_values.%d.key` and `past_key_values.%d.value`. */
  readonly names?: LayerNames | undefined
  /** New tokens of each sequence that the next run reads. Default 1. */
  readonly tokens?: number | undefined
}

/**
 * What an exported model goes on from after an eviction: the past of each layer [S, G, rows, d], `attention_mask` int64
 * [S, rows + tokens], 0 where a shorter sequence is padded on the left, and `position_ids` int64 [S, tokens], which go on where the
 * prompt ended, since kept keys are rotated for the positions that they had. The run after that goes on from the `present` tensors,
 * as ever: its positions are one higher.
 *
 *     const { cache: kept } = await evict(model, cache, window, policies.snapkv({ keep: 0.2 }))
 *     const outputs = await session.run({ input_ids, ...rectangularFeeds(kept) })
 *
 * A model has one mask for all layers and heads: they must keep equally many rows of a sequence, as they do by a policy of scope
 * `head` (but `pyramidkv`, whose layers differ) and a budget that heads share evenly, such as a ratio. Nothing is copied where
 * the sequences kept equally many, too. Graphs that derive positions from the past's length (GroupQueryAttention with `do_rotary`
 * and no `position_ids`) put new tokens too early after any eviction: they need an export that takes `position_ids`.
 *
 * @throws LaproxError `INVALID_ARGUMENT` where layers or heads keep different numbers of rows, and for paged caches,
 *   `DEVICE_MISMATCH` for a cache in the memory of a GPU
 */
export function rectangularFeeds(cache: KvCache, { names = past, tokens = 1 }: RectangularOptions = {}): Record<string, OnnxTensor> {
  const state = readable(cache)
  const { layers, sequences, kvHeads, headDim } = state
  integer(tokens, 'tokens', 1)
  const rows = equalRows(state)
  const most = Math.max(...rows)
  const feeds: Record<string, OnnxTensor> = {}
  for (let layer = 0; layer < layers; layer++) {
    const fill = (plane: Tensor): OnnxTensor => {
      const dims = [sequences, kvHeads, most, headDim]
      if (state.kind === 'ragged' && isDense(state, layer, most)) {
        const { data, offset } = plane as Tensor<'float32'>
        return onnxTensor(state.type, data.subarray(offset, offset + sequences * kvHeads * most * headDim), dims)
      }
      const filled = elements(state.type, sequences * kvHeads * most * headDim)
      for (let x = 0; x < sequences * kvHeads; x++) {
        const padding = most - rows[Math.floor(x / kvHeads)]!
        copyRows(state, plane, layer, x, headDim, filled, (x * most + padding) * headDim)
      }
      return onnxTensor(state.type, filled, dims)
    }
    feeds[nameOf(names.key, layer)] = fill(state.keys[layer]!)
    feeds[nameOf(names.value, layer)] = fill(state.values[layer]!)
  }
  const contexts = contextsOf(state)
  const seen = (s: number, i: number): bigint => (i < most - rows[s]! ? 0n : 1n)
  feeds.attention_mask = integers(sequences, most + tokens, seen)
  feeds.position_ids = integers(sequences, tokens, (s, i) => BigInt(contexts[s]! + i))
  return feeds
}

/** The state of a cache whose rows can be handed to a session of host memory. */
function readable(cache: KvCache): CacheState {
  const { state } = stateOf(cache)
  if (state.type === 'bfloat16')
    throw new LaproxError('INVALID_ARGUMENT', 'cache is bfloat16; expected float32 or float16, which onnxruntime-node takes')
  if (state.kind === 'paged')
    throw new LaproxError('INVALID_ARGUMENT', "cache is paged; expected a contiguous or ragged one: compact it to the target 'ragged'")
  if (cache.device.backend !== 'cpu') {
    throw new LaproxError('DEVICE_MISMATCH', `cache is in the memory of ${cache.device.name}; expected host memory, which sessions are fed from`)
  }
  return state
}

/** [S] rows that every layer and head keeps of each sequence. */
function equalRows({ layers, sequences, kvHeads, lengths }: CacheState): Int32Array {
  const rows = new Int32Array(sequences)
  for (let s = 0; s < sequences; s++) {
    rows[s] = lengths[s * kvHeads]!
    for (let layer = 0; layer < layers; layer++) {
      const begin = (layer * sequences + s) * kvHeads
      const ofHeads = lengths.subarray(begin, begin + kvHeads)
      if (ofHeads.every((length) => length === rows[s])) continue
      const one = sequences === 1 ? '' : ` of sequence ${s}`
      const found = ofHeads.every((length) => length === ofHeads[0])
        ? `layer ${layer} keeps ${ofHeads[0]} rows in each head${one}, and layer 0 ${rows[s]}`
        : `the heads of layer ${layer} keep ${Array.from(ofHeads).join(', ')} rows${one}`
      const advice = 'choose by a policy of scope head whose layers have equal budgets, or use a graph with a mask per head (PaddedPast)'
      throw new LaproxError('INVALID_ARGUMENT', `${found}; expected equally many in all layers and heads, which share one attention_mask: ${advice}`)
    }
  }
  return rows
}

/** Whether the heads of a layer, of `rows` rows each, lie one after the other without gaps. */
function isDense({ starts, lengths, layers }: CacheState, layer: number, rows: number): boolean {
  const segments = lengths.length / layers
  for (let x = 0; x < segments; x++) if (starts![layer * segments + x] !== x * rows || lengths[layer * segments + x] !== rows) return false
  return true
}

/** int64 [rows, columns] */
function integers(rows: number, columns: number, value: (row: number, column: number) => bigint): OnnxTensor {
  const data = BigInt64Array.from({ length: rows * columns }, (_, i) => value(Math.floor(i / columns), i % columns))
  return new OnnxTensor('int64', data, [rows, columns])
}

/** [S] tokens that each sequence has read. */
function contextsOf({ contextLengths, sequences, kvHeads, layers, lengths }: CacheState): Int32Array {
  if (contextLengths !== undefined) return contextLengths.slice()
  const contexts = new Int32Array(sequences)
  for (let x = 0; x < layers * sequences * kvHeads; x++) {
    const s = Math.floor(x / kvHeads) % sequences
    contexts[s] = Math.max(contexts[s]!, lengths[x]!)
  }
  return contexts
}

type Elements = Float32Array | Uint16Array | Int32Array

/** New elements, zeros. */
function elements(type: FloatType, count: number): Float32Array | Uint16Array {
  return type === 'float32' ? new Float32Array(count) : new Uint16Array(count)
}

function onnxTensor(type: FloatType, data: Elements, dims: readonly number[]): OnnxTensor {
  return new OnnxTensor(type as 'float32', data as Float32Array, dims)
}

/** Copies the rows of a segment, `width` elements each, to where they follow each other. */
function copyRows(state: CacheState, plane: Tensor, layer: number, segment: number, width: number, to: Elements, at: number): void {
  const { axes, kvHeads, layers, lengths, starts } = state
  const index = layer * (lengths.length / layers) + segment
  const along = (axis: number): number => (axis < 0 ? 0 : plane.strides[axis]!)
  const first =
    starts === undefined
      ? Math.floor(segment / kvHeads) * along(axes.page) + (segment % kvHeads) * along(axes.head)
      : starts[index]! * along(axes.token)
  const [begin, stride, rows] = [plane.offset + first, along(axes.token), lengths[index]!]
  const from = plane.data as TensorDataMap['float32']
  if (stride === width) to.set(from.subarray(begin, begin + rows * width), at)
  else for (let i = 0; i < rows; i++) to.set(from.subarray(begin + i * stride, begin + i * stride + width), at + i * width)
}

/** What a graph with a mask per head calls the tensors of its layers; `%d` is the layer. */
export interface PaddedNames {
  /** Input: the keys that were read, [G, rows, d]. */
  readonly pastKey: string
  /** Input: the values that were read, [G, rows, d]. */
  readonly pastValue: string
  /** Input: what is added to the logits, [G, rows]. */
  readonly pastMask: string
  /** Output: the keys of the new tokens alone, [G, tokens, d]. */
  readonly key: string
  /** Output: the values of the new tokens alone, [G, tokens, d]. */
  readonly value: string
}

/** What {@link PaddedPast} takes. */
export interface PaddedOptions {
  /** Default: `past_key.%d`, `past_value.%d`, `past_mask.%d`, `key.%d`, `value.%d`. */
  readonly names?: Partial<PaddedNames> | undefined
  /**
   * Rows of padding that each head is given beyond the longest whenever memory is taken: {@link PaddedPast.append} fills them
   * without moving what is there. Default 0.
   */
  readonly room?: number | undefined
  /** Whether tensors have a first dimension S for the sequences. Default: where there is more than one. */
  readonly batched?: boolean | undefined
}

/** The sizes of a past. */
export interface PastShape {
  /** At least 1. */
  readonly layers: number
  /** G. */
  readonly kvHeads: number
  /** d, a multiple of 8 up to 256. */
  readonly headDim: number
  /** S. Default 1. */
  readonly sequences?: number | undefined
  /** Default 'float32'. */
  readonly type?: 'float32' | 'float16' | undefined
}

/** A past's sizes, all of them. */
interface Shape {
  readonly layers: number
  readonly sequences: number
  readonly kvHeads: number
  readonly headDim: number
  readonly type: 'float32' | 'float16'
}

/** A layer's rows, equally many for each of the S * G heads: those beyond a head's length are padding. */
interface PaddedLayer {
  readonly rows: number
  /** [S * G, rows, d] */
  readonly keys: Float32Array | Uint16Array
  readonly values: Float32Array | Uint16Array
  /** [S * G, rows] */
  readonly mask: Float32Array | Uint16Array
  /** [S * G, rows], where tokens have others than their indices. */
  readonly positions: Int32Array | undefined
  /** [S * G] */
  readonly lengths: Int32Array
}

const paddedNames: PaddedNames = { pastKey: 'past_key.%d', pastValue: 'past_value.%d', pastMask: 'past_mask.%d', key: 'key.%d', value: 'value.%d' }

/**
 * The past of a graph that takes each head's own number of rows: padded to the longest head of the layer, and masked there.
 *
 *     const past = PaddedPast.from(kept, { room: 64 })
 *     const outputs = await session.run({ ids, position, ...past.feeds })
 *     past.append(outputs)
 *
 * Inputs of the graph are keys and values [G, rows, d], rotated, and a mask [G, rows] that is added to the logits; outputs are keys
 * and values of the new tokens [G, tokens, d]. For a batch all have a first dimension S; its sequences read equally many tokens in a run.
 */
export class PaddedPast {
  readonly #shape: Shape
  readonly #names: PaddedNames
  readonly #room: number
  readonly #batched: boolean
  readonly #layers: PaddedLayer[]
  readonly #contexts: Int32Array
  #feeds: Record<string, OnnxTensor> | undefined

  private constructor(shape: Shape, layers: PaddedLayer[], contexts: Int32Array, options: PaddedOptions) {
    this.#shape = shape
    this.#names = { ...paddedNames, ...options.names }
    this.#room = options.room ?? 0
    this.#batched = options.batched ?? shape.sequences > 1
    if (!this.#batched && shape.sequences > 1) {
      throw new LaproxError('INVALID_ARGUMENT', `batched is false; expected true for ${shape.sequences} sequences`)
    }
    this.#layers = layers
    this.#contexts = contexts
  }

  /** A past without any token, for a prompt to be read. */
  static empty({ layers, kvHeads, headDim, sequences = 1, type = 'float32' }: PastShape, options: PaddedOptions = {}): PaddedPast {
    const shape = { layers, kvHeads, headDim, sequences, type }
    const lengths = new Int32Array(sequences * kvHeads)
    const rows = integer(options.room ?? 0, 'room', 0)
    const none = Array.from({ length: layers }, () => newLayer(shape, rows, lengths.slice(), false))
    return new PaddedPast(shape, none, new Int32Array(sequences), options)
  }

  /**
   * The past that a cache is: a copy.
   *
   * @throws LaproxError `INVALID_ARGUMENT` for paged caches and bfloat16, `DEVICE_MISMATCH` for a cache in the memory of a GPU
   */
  static from(cache: KvCache, options: PaddedOptions = {}): PaddedPast {
    const state = readable(cache)
    const { layers, sequences, kvHeads, headDim } = state
    const shape: Shape = { layers, kvHeads, headDim, sequences, type: state.type as 'float32' | 'float16' }
    const room = integer(options.room ?? 0, 'room', 0)
    const padded = state.keys.map((keys, layer) => {
      const lengths = cache.lengths(layer)
      const to = newLayer(shape, Math.max(...lengths) + room, lengths, state.positions !== undefined)
      for (let x = 0; x < lengths.length; x++) {
        copyRows(state, keys, layer, x, headDim, to.keys, x * to.rows * headDim)
        copyRows(state, state.values[layer]!, layer, x, headDim, to.values, x * to.rows * headDim)
        if (to.positions !== undefined) copyRows(state, state.positions![layer]!, layer, x, 1, to.positions, x * to.rows)
        to.mask.fill(0, x * to.rows, x * to.rows + lengths[x]!)
      }
      return to
    })
    return new PaddedPast(shape, padded, contextsOf(state), options)
  }

  /** [S] tokens that each sequence has read, which is the position of its next one: a copy. */
  get contextLengths(): Int32Array {
    return this.#contexts.slice()
  }

  /** What `session.run` takes beside the new tokens. */
  get feeds(): OnnxTensors {
    this.#feeds ??= this.#makeFeeds()
    return this.#feeds
  }

  /**
   * Adds the tokens that a run has just read, after each head's last row.
   *
   * @param outputs keys and values of all layers
   * @throws LaproxError `INVALID_ARGUMENT` for tensors that are missing or of another type or shape; nothing is added then
   */
  append(outputs: OnnxTensors): void {
    const { layers, sequences, kvHeads, headDim } = this.#shape
    const segments = sequences * kvHeads
    const planes = Array.from({ length: layers }, (_, layer) => [
      this.#output(outputs, this.#names.key, layer),
      this.#output(outputs, this.#names.value, layer),
    ])
    const tokens = planes[0]![0]!.length / (segments * headDim)
    for (const [layer, [keys, values]] of planes.entries()) {
      if (keys!.length !== tokens * segments * headDim || values!.length !== keys!.length) {
        throw new LaproxError('INVALID_ARGUMENT', `outputs: layer ${layer} has other numbers of tokens than the keys of layer 0, ${tokens}`)
      }
    }
    for (const [layer, [keys, values]] of planes.entries()) {
      const to = this.#withRoom(layer, tokens)
      for (let x = 0; x < segments; x++) {
        const [from, end, at] = [x * tokens * headDim, (x + 1) * tokens * headDim, x * to.rows + to.lengths[x]!]
        to.keys.set(keys!.subarray(from, end), at * headDim)
        to.values.set(values!.subarray(from, end), at * headDim)
        to.mask.fill(0, at, at + tokens)
        const context = this.#contexts[Math.floor(x / kvHeads)]!
        if (to.positions !== undefined) for (let i = 0; i < tokens; i++) to.positions[at + i] = context + i
        to.lengths[x]! += tokens
      }
    }
    for (let s = 0; s < sequences; s++) this.#contexts[s]! += tokens
  }

  /** What it holds as a cache over the same memory, to be evicted from: appending to the past while that cache is used is an error. */
  cache(device: Device): KvCache {
    const { type, headDim } = this.#shape
    const plane = ({ rows }: PaddedLayer, data: Float32Array | Uint16Array): Tensor =>
      new Tensor(type, data as Float32Array, [...this.#dims(rows), headDim])
    const positions = this.#layers.flatMap(({ rows, positions }) =>
      positions === undefined ? [] : [new Tensor('int32', positions, this.#dims(rows))],
    )
    return KvCache.from(device, {
      keys: this.#layers.map((layer) => plane(layer, layer.keys)),
      values: this.#layers.map((layer) => plane(layer, layer.values)),
      lengths: this.#layers.map(({ lengths }) => lengths),
      contextLengths: this.#contexts,
      ...(positions.length > 0 ? { positions } : {}),
    })
  }

  /** Of so many rows. */
  #dims(rows: number): number[] {
    const { sequences, kvHeads } = this.#shape
    return this.#batched ? [sequences, kvHeads, rows] : [kvHeads, rows]
  }

  #makeFeeds(): Record<string, OnnxTensor> {
    const { type, headDim } = this.#shape
    const feeds: Record<string, OnnxTensor> = {}
    for (const [layer, { rows, keys, values, mask }] of this.#layers.entries()) {
      const dims = this.#dims(rows)
      feeds[nameOf(this.#names.pastKey, layer)] = onnxTensor(type, keys, [...dims, headDim])
      feeds[nameOf(this.#names.pastValue, layer)] = onnxTensor(type, values, [...dims, headDim])
      feeds[nameOf(this.#names.pastMask, layer)] = onnxTensor(type, mask, dims)
    }
    return feeds
  }

  /** The elements of an output of a layer. */
  #output(outputs: OnnxTensors, name: string, layer: number): Float32Array | Uint16Array {
    const { type, headDim } = this.#shape
    const [at, tensor] = [nameOf(name, layer), outputs[nameOf(name, layer)]]
    if (tensor === undefined) throw missing(outputs, at)
    const { dims } = tensor
    const expected = [...this.#dims(dims.at(-2) ?? 0), headDim]
    if (tensor.type !== type || dims.join() !== expected.join()) {
      throw new LaproxError(
        'INVALID_ARGUMENT',
        `${at} is ${tensor.type} ${show(dims)}; expected ${type} ${this.#batched ? '[S, G, tokens, d]' : '[G, tokens, d]'} = ${show(expected)}`,
      )
    }
    return view(tensor, at).data as Float32Array | Uint16Array
  }

  /** A layer with room for more tokens: moved into new memory where it has none. */
  #withRoom(layer: number, tokens: number): PaddedLayer {
    const from = this.#layers[layer]!
    const needed = Math.max(...from.lengths) + tokens
    if (needed <= from.rows) return from
    const { headDim } = this.#shape
    const to = newLayer(this.#shape, needed + this.#room, from.lengths, from.positions !== undefined)
    for (const [x, length] of from.lengths.entries()) {
      const [old, now] = [x * from.rows, x * to.rows]
      to.keys.set(from.keys.subarray(old * headDim, (old + length) * headDim), now * headDim)
      to.values.set(from.values.subarray(old * headDim, (old + length) * headDim), now * headDim)
      to.mask.fill(0, now, now + length)
      to.positions?.set(from.positions!.subarray(old, old + length), now)
    }
    this.#layers[layer] = to
    this.#feeds = undefined
    return to
  }
}

/** A layer that is all padding. */
function newLayer({ type, sequences, kvHeads, headDim }: Shape, rows: number, lengths: Int32Array, positioned: boolean): PaddedLayer {
  const count = sequences * kvHeads * rows
  return {
    rows,
    keys: elements(type, count * headDim),
    values: elements(type, count * headDim),
    mask: elements(type, count).fill(paddingMask[type]),
    positions: positioned ? new Int32Array(count) : undefined,
    lengths,
  }
}

/** Added to the logits of padding, which makes its attention zero; of float16 the least finite one. */
const paddingMask = { float32: -1e30, float16: 0xfbff }
