import { byteExtent, byteStride, floatType, integer, maxInt32, object, shape, tensors, wrong } from './check.js'
import { type Device, handleOf } from './device.js'
import { LaproxError } from './errors.js'
import { type NativeHandle, native, type Section, SectionWriter } from './native.js'
import type { FloatType, Tensor } from './tensor.js'

/** One value for all layers, or one per layer. */
export type PerLayer<T> = T | readonly T[]

/** The attention side of a language model: H query heads in groups that share G KV heads, d features a head. */
export interface ModelDescription {
  /** L. */
  readonly layers: number
  /** H, a multiple of `kvHeads`. */
  readonly queryHeads: number
  /** G. */
  readonly kvHeads: number
  /** d, a multiple of 8 up to 256. */
  readonly headDim: number
  /**
   * Per layer the output projection W_O as `o_proj.weight` [D, H * d], float32, float16 or bfloat16, with any strides. Policies
   * that look at ||v W|| need them. On a CPU device the model holds on to them: policies with projected l1 norms (`criticalkv`) and
   * `fidelity` read them again. For a GPU they may be in its memory, or in the host's: then they are there for as long as the factors
   * take.
   */
  readonly outputProjections?: readonly Tensor[] | undefined
  /** Of the logits. Default (and 0): 1 / sqrt(d). */
  readonly scale?: PerLayer<number> | undefined
  /** logit = softCap * tanh(logit / softCap). Default (and 0): none. */
  readonly softCap?: PerLayer<number> | undefined
  /** How many tokens a query sees, its own included. Default (and 0): all. */
  readonly slidingWindow?: PerLayer<number> | undefined
  /** [H] an extra logit per query head in each softmax. Default (and null): none. */
  readonly sinkLogits?: PerLayer<Float32Array | null> | undefined
}

/** The handle of a model; throws `DISPOSED`, or `INVALID_ARGUMENT` for what is none. */
export let handleOfModel: (model: AttentionModel) => NativeHandle
/** The output projections as native code reads them; throws `DISPOSED` or `DETACHED` where their memory is gone. */
export let projectionsOf: (model: AttentionModel) => readonly ArrayBufferView[]

/**
 * What laprox needs to know of a model: shapes, how its logits become attention, and factors of its output projections,
 * derived once. Factors take (H / G * d)^2 * 4 bytes per layer and KV head; on a GPU they are in its memory.
 *
 *     const model = AttentionModel.create(device, { layers, queryHeads, kvHeads, headDim, outputProjections })
 */
export class AttentionModel implements Disposable {
  /** Where its factors are, and where calls with it run. */
  readonly device: Device
  /** L. */
  readonly layers: number
  /** H. */
  readonly queryHeads: number
  /** G. */
  readonly kvHeads: number
  /** d. */
  readonly headDim: number
  /** Whether it has output projections. */
  readonly projected: boolean
  /**
   * Fulfilled when the factors are there. Calls wait for that by themselves; where it fails (`NON_FINITE` for weights that
   * are, `OUT_OF_MEMORY`), they fail alike.
   */
  readonly ready: Promise<void>
  readonly #handle: NativeHandle
  readonly #projections: readonly Tensor[]
  #disposed = false

  private constructor(device: Device, description: ModelDescription) {
    const deviceHandle = handleOf(device)
    object(description, 'description', 'an object with layers, queryHeads, kvHeads and headDim')
    this.device = device
    this.layers = integer(description.layers, 'layers', 1)
    this.queryHeads = integer(description.queryHeads, 'queryHeads', 1)
    this.kvHeads = integer(description.kvHeads, 'kvHeads', 1)
    this.headDim = integer(description.headDim, 'headDim', 8, 256)
    if (this.headDim % 8 !== 0) throw wrong('headDim', this.headDim, 'a multiple of 8')
    if (this.queryHeads % this.kvHeads !== 0) throw wrong('queryHeads', this.queryHeads, `a multiple of kvHeads, ${this.kvHeads}`)
    this.projected = description.outputProjections !== undefined
    const { numbers, buffers } = encode(this, description)
    const projections = description.outputProjections?.slice()
    this.#projections = device.backend === 'cpu' && projections !== undefined ? projections : []
    this.#handle = {}
    const created = native().createModel(deviceHandle, numbers, [this.#handle, projections, undefined, ...buffers])
    this.ready = created.then(() => undefined)
    // Whoever does not look at `ready` sees the failure in the calls; it should not end the process.
    this.ready.catch(() => undefined)
  }

  static {
    handleOfModel = (model) => {
      if (!(model instanceof AttentionModel)) throw wrong('model', model, 'an AttentionModel')
      if (model.#disposed) throw new LaproxError('DISPOSED', 'the model was used after its disposal')
      handleOf(model.device)
      return model.#handle
    }
    projectionsOf = (model) => model.#projections.map(({ data }) => data)
  }

  /**
   * Describes a model to a device. What is wrong with the description throws at once; the factors are computed on the
   * device's threads, in D * (H / G * d)^2 multiply-adds per layer and KV head.
   *
   * @throws LaproxError `INVALID_ARGUMENT`, `DISPOSED`, `DETACHED`
   */
  static create(device: Device, description: ModelDescription): AttentionModel {
    return new AttentionModel(device, description)
  }

  /** Lets go of the factors, after the calls that use them. Using the model is an error from now on; doing it twice is not. */
  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    native().closeModel(this.#handle)
  }

  /** What `using` calls: {@link AttentionModel.dispose}. */
  [Symbol.dispose](): void {
    this.dispose()
  }

  /** Whether it has been disposed of. */
  get disposed(): boolean {
    return this.#disposed
  }
}

function encode(model: AttentionModel, description: ModelDescription): Section {
  const { layers, queryHeads, kvHeads, headDim } = model
  const projections = description.outputProjections
  let type: FloatType = 'float32'
  let modelDim = 0
  if (projections !== undefined) {
    tensors(projections, 'outputProjections', layers)
    type = floatType(projections, 'outputProjections')
    modelDim = projections[0]!.dims[0] ?? 0
    for (const [i, tensor] of projections.entries()) {
      if (tensor.device !== undefined && tensor.device !== model.device) {
        throw new LaproxError(
          'DEVICE_MISMATCH',
          `outputProjections[${i}] is in the memory of ${tensor.device.name}; expected that of this ${model.device.name}, or the host's`,
        )
      }
      shape(tensor, `outputProjections[${i}]`, [modelDim, queryHeads * headDim], '[D, queryHeads * headDim]')
    }
    if (modelDim === 0) throw wrong('outputProjections[0]', projections[0], 'D of at least 1')
  }
  const writer = new SectionWriter()
  writer.push(layers, queryHeads, kvHeads, headDim, modelDim, floatTypes.indexOf(type))
  const scales = perLayer(description.scale, 'scale', layers, 0, (value, at) => real(value, at))
  const softCaps = perLayer(description.softCap, 'softCap', layers, 0, (value, at) => real(value, at))
  const windows = perLayer(description.slidingWindow, 'slidingWindow', layers, 0, (value, at) => integer(value, at, 0, maxInt32))
  const sinks = perLayer(description.sinkLogits, 'sinkLogits', layers, null, (value, at) => checkSinks(value, at, queryHeads))
  for (let i = 0; i < layers; i++) {
    const tensor = projections?.[i]
    if (tensor === undefined) writer.push(-1, 0, 0, 0, 0)
    else writer.place(tensor).push(byteExtent(tensor), byteStride(tensor, 1), byteStride(tensor, 0))
    writer.push(scales[i]!, softCaps[i]!, windows[i]!, writer.buffer(sinks[i] ?? undefined))
  }
  return writer.section()
}

/** In the order of lpx_dtype. */
export const floatTypes: readonly FloatType[] = ['float32', 'float16', 'bfloat16']

function perLayer<T>(given: PerLayer<T> | undefined, at: string, layers: number, none: T, check: (value: unknown, at: string) => T): T[] {
  if (!Array.isArray(given)) {
    const value = given === undefined ? none : check(given, at)
    return Array<T>(layers).fill(value)
  }
  if (given.length !== layers)
    throw new LaproxError('INVALID_ARGUMENT', `${at} has ${given.length} values; expected one, or one per layer, ${layers}`)
  return Array.from(given as readonly T[], (value, i) => check(value, `${at}[${i}]`))
}

function real(value: unknown, at: string): number {
  if (typeof value !== 'number' || !(value >= 0 && value <= 3.4e38)) throw wrong(at, value, 'a finite number of at least 0')
  return value
}

function checkSinks(value: unknown, at: string, queryHeads: number): Float32Array | null {
  if (value === null) return null
  if (!(value instanceof Float32Array) || value.length !== queryHeads) {
    throw wrong(at, value, `a Float32Array with one logit per query head, ${queryHeads}, or null`)
  }
  return value
}
