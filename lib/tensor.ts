import { type CallOptions, call } from './call.js'
import { byteExtent } from './check.js'
import { type Device, handleOf } from './device.js'
import { LaproxError, show, suggest } from './errors.js'
import { allocateOn, arrayIn, checkPointer, copyFrom, copyInto, copyTo, DeviceMemory } from './memory.js'

/**
 * The typed array behind each tensor type. The names are ONNX's, as in onnxruntime-common. `float16` and `bfloat16` are bit
 * patterns in a `Uint16Array`, `float8e4m3fn`, `float8e5m2` and `bool` one byte each.
 */
export interface TensorDataMap {
  float32: Float32Array
  float16: Uint16Array
  bfloat16: Uint16Array
  int32: Int32Array
  float64: Float64Array
  float8e4m3fn: Uint8Array
  float8e5m2: Uint8Array
  int8: Int8Array
  int16: Int16Array
  int64: BigInt64Array
  uint8: Uint8Array
  uint16: Uint16Array
  uint32: Uint32Array
  uint64: BigUint64Array
  bool: Uint8Array
}

/**
 * The element type of a tensor. Caches, windows and projections are of a {@link FloatType}, page tables, lengths and
 * positions `int32`; the others exist to be read from and written to files.
 */
export type TensorType = keyof TensorDataMap

/** The element types laprox computes with. */
export type FloatType = 'float32' | 'float16' | 'bfloat16'

/** The shape of a `Float16Array`, for platforms and type libraries that do not have it yet. */
export interface Float16Data extends ArrayBufferView {
  /** 2. */
  readonly BYTES_PER_ELEMENT: number
  /** Elements. */
  readonly length: number
  /** Its name, by which it is known. */
  readonly [Symbol.toStringTag]: 'Float16Array'
}

/** What a tensor of type `T` can be made from: its typed array, or a `Float16Array` for `float16`. */
export type TensorInput<T extends TensorType> = T extends 'float16' ? Uint16Array | Float16Data : TensorDataMap[T]

/** How the elements of a tensor lie in its data. */
export interface TensorLayout {
  /** Elements (not bytes) from one index to the next, per dimension; at least 0. Default: row-major without gaps. */
  readonly strides?: readonly number[] | undefined
  /** Elements before the first one. Default 0. */
  readonly offset?: number | undefined
}

interface DataConstructor {
  new (length: number): ArrayBufferView
  new (buffer: ArrayBuffer, byteOffset?: number, length?: number): ArrayBufferView
  readonly BYTES_PER_ELEMENT: number
  readonly name: string
}

const constructors: Readonly<Record<TensorType, DataConstructor>> = {
  float32: Float32Array,
  float16: Uint16Array,
  bfloat16: Uint16Array,
  int32: Int32Array,
  float64: Float64Array,
  float8e4m3fn: Uint8Array,
  float8e5m2: Uint8Array,
  int8: Int8Array,
  int16: Int16Array,
  int64: BigInt64Array,
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
  uint64: BigUint64Array,
  bool: Uint8Array,
}

/** Every tensor type. */
export const tensorTypes: readonly TensorType[] = Object.freeze(Object.keys(constructors) as TensorType[])

/** Bytes of one element. */
export function elementBytes(type: TensorType): number {
  // Asked for many times a call, by the layers of a cache: the usual ones first.
  if (type === 'bfloat16' || type === 'float16') return 2
  return type === 'float32' || type === 'int32' ? 4 : constructors[type].BYTES_PER_ELEMENT
}

/** A tensor over memory of a device; one that owns it gives it back when it is disposed of. */
export let onDevice: <T extends TensorType>(
  type: T,
  memory: DeviceMemory,
  dims: readonly number[],
  layout?: TensorLayout,
  owns?: boolean,
) => Tensor<T>
/** The memory of a tensor on a GPU. */
export let memoryOf: (tensor: Tensor) => DeviceMemory
/** The typed array of a tensor, or the address of its device memory; throws `DISPOSED` or `DETACHED` where that is gone. */
export let placeOf: (tensor: Tensor) => ArrayBufferView | number

/**
 * A typed, strided view of a typed array in host memory, or of memory of a GPU, in the vocabulary of onnxruntime-common. It
 * copies nothing: writing to `data` writes to the tensor. Shape, strides and offset never change.
 *
 * Memory of a GPU is an engine's own, used where it is ({@link Tensor.fromDevicePointer}), or from the device's pool
 * ({@link Tensor.allocate}, {@link Tensor.to}); it comes and goes by copies that are asked for ({@link Tensor.to},
 * {@link Tensor.getData}). V8 is not told of it, since it is no memory of the host: dispose of it when done.
 *
 * The buffer may be a `SharedArrayBuffer`, but not a resizable or growable one, since native threads read it.
 */
export class Tensor<T extends TensorType = TensorType> implements Disposable {
  /** The element type. */
  readonly type: T
  /** Elements along each dimension; none for a scalar. */
  readonly dims: readonly number[]
  /** Elements (not bytes) from one index to the next, per dimension. */
  readonly strides: readonly number[]
  /** Elements of `data` before the first one. */
  readonly offset: number
  /** The number of elements: the product of `dims`. */
  readonly size: number
  #data: TensorDataMap[T] | undefined
  #length: number
  #memory: DeviceMemory | undefined
  #ownsMemory = false
  #owner: Tensor | undefined
  #disposed = false

  /**
   * @param type the element type
   * @param data its typed array (`Float16Array` is taken for `float16` too, and becomes a `Uint16Array` over the same buffer).
   *   Without `layout` it holds exactly the elements of `dims`; with it, the elements must lie inside.
   * @param dims elements along each dimension: integers of at least 0, whose product (zeros left out) is a safe integer
   * @param layout strides and offset, in elements
   * @throws LaproxError `INVALID_ARGUMENT` for a wrong type, shape or kind of buffer, `OUT_OF_BOUNDS` for strides or an offset
   *   that leave the data
   */
  constructor(type: T, data: TensorInput<T>, dims: readonly number[], layout?: TensorLayout) {
    const memory = (data as unknown) instanceof DeviceMemory ? (data as unknown as DeviceMemory) : undefined
    const array = memory === undefined ? checkData(type, data) : undefined
    const length = array === undefined ? Math.floor(memory!.bytes / elementBytes(type)) : array.length
    const size = checkDims(dims)
    this.type = type
    this.dims = dims.slice()
    this.size = size
    if (layout === undefined && array !== undefined) {
      if (length !== size) throw wrongLength(array, dims, size)
      this.strides = rowMajor(dims)
      this.offset = 0
    } else {
      this.strides = layout?.strides === undefined ? rowMajor(dims) : checkStrides(layout.strides, dims)
      this.offset = layout?.offset === undefined ? 0 : checkOffset(layout.offset)
      checkExtent(this, length, array)
    }
    this.#data = array
    this.#length = length
    this.#memory = memory
    this.#owner = undefined
  }

  static {
    onDevice = (type, memory, dims, layout, owns = false) => {
      const tensor = new Tensor(type, memory as never, dims, layout)
      tensor.#ownsMemory = owns
      return tensor
    }
    memoryOf = (tensor) => tensor.#memory!
    placeOf = (tensor) => {
      const memory = tensor.#memory
      if (memory === undefined) return tensor.data
      if (tensor.disposed) throw new LaproxError('DISPOSED', `the tensor ${describe(tensor)} was used after its disposal`)
      return memory.address
    }
  }

  /**
   * Memory that an engine has on a GPU, used where it is: nothing is copied or owned, and the engine keeps it until laprox's
   * calls on it have ended. Rows of keys, values and queries begin at multiples of 16 bytes.
   *
   * @param pointer the device's address of element 0 of the layout
   * @throws LaproxError `INVALID_ARGUMENT` for what is no address, wrong types and shapes, and a CPU device, `DISPOSED`
   */
  static fromDevicePointer<T extends TensorType>(
    device: Device,
    type: T,
    pointer: bigint,
    dims: readonly number[],
    layout?: TensorLayout,
  ): Tensor<T> {
    checkGpu(device)
    checkType(type)
    const address = checkPointer(pointer, 'pointer', elementBytes(type))
    const size = checkDims(dims)
    const strides = layout?.strides === undefined ? rowMajor(dims) : checkStrides(layout.strides, dims)
    const offset = layout?.offset === undefined ? 0 : checkOffset(layout.offset)
    const elements = offset + (size === 0 ? 0 : dims.reduce((sum, dim, i) => sum + (dim - 1) * strides[i]!, 1))
    return onDevice(type, new DeviceMemory(device, address, elements * elementBytes(type)), dims, layout ?? {})
  }

  /**
   * A new tensor in a device's memory, from its pool: what it holds is not defined. On a CPU device, zeros.
   *
   * @throws LaproxError (as a rejection) `INVALID_ARGUMENT` for a wrong type or shape, `OUT_OF_MEMORY`, `DISPOSED`
   */
  static async allocate<T extends TensorType>(device: Device, type: T, dims: readonly number[], options?: CallOptions): Promise<Tensor<T>> {
    checkType(type)
    const size = checkDims(dims)
    if (!isGpu(device)) return Tensor.zeros(type, dims)
    const memory = await call(device, options, (hooks) => allocateOn(device, size * elementBytes(type), hooks))
    return onDevice(type, memory, dims, undefined, true)
  }

  /**
   * A new tensor full of zeros. From 4 MiB on its data begin at a cache line (so not at the first byte of `data.buffer`), and lie on huge pages
   * where the system gives them: compactions into and out of such memory are faster.
   *
   * @throws LaproxError `INVALID_ARGUMENT` for a wrong type or shape, `OUT_OF_MEMORY` where the platform refuses
   */
  static zeros<T extends TensorType>(type: T, dims: readonly number[]): Tensor<T> {
    checkType(type)
    const size = checkDims(dims)
    let data: TensorInput<T>
    try {
      data = arrayIn(constructors[type], size, (bytes) => new ArrayBuffer(bytes)) as TensorInput<T>
    } catch (cause) {
      const bytes = size * elementBytes(type)
      throw new LaproxError('OUT_OF_MEMORY', `dims: ${type} ${show(dims)} takes ${bytes} bytes, which could not be allocated`, { cause })
    }
    return new Tensor(type, data, dims)
  }

  /**
   * The typed array, whole: the first element of the tensor is `data[offset]`.
   *
   * @throws LaproxError `DISPOSED`, or `DETACHED` where the buffer was transferred meanwhile
   */
  get data(): TensorDataMap[T] {
    const data = this.#data
    if (this.#memory !== undefined && !this.disposed) {
      throw new LaproxError(
        'DEVICE_MISMATCH',
        `the data of the tensor ${describe(this)} is in the memory of ${this.#memory.device.name}: copy it first, by await tensor.getData() or await tensor.to('cpu')`,
      )
    }
    if (data === undefined || this.#owner?.disposed) {
      throw new LaproxError('DISPOSED', `the tensor ${describe(this)} was used after its disposal`)
    }
    if (data.length !== this.#length) {
      throw new LaproxError('DETACHED', `the buffer of the tensor ${describe(this)} has been detached: it was transferred elsewhere`)
    }
    return data
  }

  /** Where the data is: in host memory, or that of a GPU. */
  get location(): 'cpu' | 'cuda' {
    return this.#memory === undefined ? 'cpu' : 'cuda'
  }

  /** The GPU whose memory it is in; undefined for host memory. */
  get device(): Device | undefined {
    return this.#memory?.device
  }

  /**
   * The address of the first element in the memory of its GPU.
   *
   * @throws LaproxError `DEVICE_MISMATCH` where it is in host memory, `DISPOSED`
   */
  get pointer(): bigint {
    const place = placeOf(this as Tensor)
    if (typeof place === 'number') return BigInt(place + this.offset * elementBytes(this.type))
    throw new LaproxError('DEVICE_MISMATCH', `the tensor ${describe(this)} is in host memory; expected one on a GPU`)
  }

  /**
   * The tensor on a device: itself where it is there, else a copy, made asynchronously on the call's stream. To the host come
   * the bytes from the first element to the last as they lie, with the same strides; to a GPU the elements in row-major order
   * without gaps. The source must stay as it is until the promise is fulfilled. Large copies to the host are in page-locked
   * memory.
   *
   * @param device a device, or 'cpu' for host memory
   * @throws LaproxError (as a rejection) `OUT_OF_MEMORY`, `DISPOSED`, `DETACHED`, `UNSUPPORTED` between two GPUs, `DEVICE_ERROR`
   */
  async to(device: Device | 'cpu', options?: CallOptions): Promise<Tensor<T>> {
    const memory = this.#memory
    const target = device !== 'cpu' && isGpu(device) ? device : undefined
    placeOf(this as Tensor)
    if (memory?.device === target) return this
    if (memory === undefined) {
      const copy = await call(target!, options, (hooks) => copyTo(target!, packed(this), hooks))
      return onDevice(this.type, copy, this.dims, undefined, true)
    }
    if (target !== undefined) {
      throw new LaproxError(
        'UNSUPPORTED',
        `a tensor of ${memory.device.name} goes to ${target.name} by way of the host: await tensor.to('cpu') first`,
      )
    }
    const first = this.offset * elementBytes(this.type)
    const buffer = await call(memory.device, options, (hooks) => copyFrom(memory, first, byteExtent(this as Tensor), hooks))
    return new Tensor(this.type, new constructors[this.type](buffer) as TensorInput<T>, this.dims, { strides: this.strides })
  }

  /**
   * Overwrites the elements of a tensor on a GPU with those of one in host memory, asynchronously on the call's stream. The
   * source must stay as it is until the promise is fulfilled.
   *
   * @param source of the same type and dims
   * @throws LaproxError (as a rejection) `INVALID_ARGUMENT` for another type or shape, or for rows with gaps, `DEVICE_MISMATCH`
   *   unless this is on a GPU and the source is not, `DISPOSED`, `DETACHED`, `DEVICE_ERROR`
   */
  async copyFrom(source: Tensor<T>, options?: CallOptions): Promise<void> {
    const memory = this.#memory
    if (!(source instanceof Tensor) || source.type !== this.type || source.dims.join() !== this.dims.join()) {
      throw new LaproxError('INVALID_ARGUMENT', `source is ${source instanceof Tensor ? describe(source) : show(source)}; expected ${describe(this)}`)
    }
    if (memory === undefined || source.location !== 'cpu') {
      throw new LaproxError('DEVICE_MISMATCH', `the copy goes from ${source.location} to ${this.location}; expected host memory to a GPU's`)
    }
    if (!this.contiguous) throw new LaproxError('INVALID_ARGUMENT', `the tensor has strides ${show(this.strides)}; expected elements without gaps`)
    placeOf(this as Tensor)
    await call(memory.device, options, (hooks) => copyInto(memory, this.offset * elementBytes(this.type), packed(source), hooks))
  }

  /**
   * The elements in row-major order without gaps, wherever they are: of host memory a view where they already lie so, else a copy.
   *
   * @throws LaproxError (as a rejection) as {@link Tensor.to}
   */
  async getData(options?: CallOptions): Promise<TensorDataMap[T]> {
    return packed(await this.to('cpu', options))
  }

  /** Whether the elements lie in row-major order without gaps. */
  get contiguous(): boolean {
    let expected = 1
    for (let i = this.dims.length - 1; i >= 0; i--) {
      const dim = this.dims[i]!
      if (dim === 0) return true
      if (dim !== 1 && this.strides[i] !== expected) return false
      expected *= dim
    }
    return true
  }

  /**
   * One index of the first dimension, as a view of the same data. It is disposed with the tensor that it comes from;
   * disposing of it alone frees nothing.
   *
   * @param index from 0, or from -1 backwards
   * @throws LaproxError `INVALID_ARGUMENT` for a scalar, `OUT_OF_BOUNDS` for an index outside the dimension
   */
  at(index: number): Tensor<T> {
    const count = firstDim(this)
    const at = index < 0 ? index + count : index
    if (!Number.isInteger(at) || at < 0 || at >= count) {
      throw new LaproxError(
        'OUT_OF_BOUNDS',
        `index is ${show(index)}; expected an integer from ${-count} to ${count - 1} for dims ${show(this.dims)}`,
      )
    }
    return this.#view(this.dims.slice(1), this.strides.slice(1), this.offset + at * this.strides[0]!)
  }

  /**
   * Indices [begin, end) of the first dimension, as a view of the same data: see {@link Tensor.at}.
   *
   * @throws LaproxError `INVALID_ARGUMENT` for a scalar, `OUT_OF_BOUNDS` unless 0 <= begin <= end <= dims[0]
   */
  subarray(begin: number, end?: number): Tensor<T> {
    const count = firstDim(this)
    const stop = end ?? count
    if (!Number.isInteger(begin) || !Number.isInteger(stop) || begin < 0 || stop < begin || stop > count) {
      throw new LaproxError(
        'OUT_OF_BOUNDS',
        `[begin, end) is [${show(begin)}, ${show(stop)}); expected 0 <= begin <= end <= ${count} for dims ${show(this.dims)}`,
      )
    }
    return this.#view([stop - begin, ...this.dims.slice(1)], this.strides, this.offset + begin * this.strides[0]!)
  }

  /**
   * Lets go of the data; memory of a GPU's pool goes back once the calls that use it have ended. Using the tensor, or a view of
   * it, is an error from now on; doing it twice is not.
   */
  dispose(): void {
    this.#data = undefined
    this.#disposed = true
    if (this.#ownsMemory) this.#memory?.dispose()
  }

  /** What `using` calls: {@link Tensor.dispose}. */
  [Symbol.dispose](): void {
    this.dispose()
  }

  /** Whether the tensor, or the one it is a view of, has been disposed of. */
  get disposed(): boolean {
    return this.#disposed || this.#owner?.disposed === true || this.#memory?.disposed === true
  }

  #view(dims: readonly number[], strides: readonly number[], offset: number): Tensor<T> {
    placeOf(this as Tensor)
    const data = (this.#memory ?? this.#data) as TensorInput<T>
    // An empty view may begin anywhere; keep it inside.
    const view = new Tensor(this.type, data, dims, { strides, offset: dims.includes(0) ? 0 : offset })
    view.#owner = this.#owner ?? (this as Tensor)
    return view
  }
}

/** `float32 [8, 100, 64]`: a tensor as error messages show it. */
export function describe(tensor: Tensor): string {
  return `${tensor.type} ${show(tensor.dims)}`
}

/** Whether a device is a GPU. */
function isGpu(device: Device): boolean {
  handleOf(device)
  return device.backend === 'cuda'
}

function checkGpu(device: Device): void {
  if (!isGpu(device)) throw new LaproxError('INVALID_ARGUMENT', 'device is the CPU; expected a CUDA device, whose memory the pointer is to')
}

function checkType(type: unknown): asserts type is TensorType {
  if (typeof type !== 'string' || !Object.hasOwn(constructors, type)) {
    throw new LaproxError('INVALID_ARGUMENT', `type is ${show(type)}; ${suggest(type, tensorTypes)}`)
  }
}

/** `data` as the typed array of `type`. */
function checkData<T extends TensorType>(type: T, data: unknown): TensorDataMap[T] {
  const wanted = constructors[type]
  // Names such as 'toString' find something too.
  if (wanted?.BYTES_PER_ELEMENT === undefined) checkType(type)
  let array = data as ArrayBufferView
  if (!(data instanceof wanted && ArrayBuffer.isView(data))) {
    // Typed arrays of other realms, and Float16Array where the platform has it.
    const tag = ArrayBuffer.isView(data) ? (data as Partial<Float16Data>)[Symbol.toStringTag] : undefined
    if (tag === 'Float16Array' && type === 'float16') {
      array = new Uint16Array(array.buffer, array.byteOffset, (data as Float16Data).length)
    } else if (tag === undefined || tag !== wanted.name) {
      throw new LaproxError('INVALID_ARGUMENT', `data is ${show(data)}; expected ${wanted.name} for type ${type}`)
    }
  }
  const buffer = array.buffer as { readonly resizable?: boolean; readonly growable?: boolean }
  if (buffer.resizable || buffer.growable) {
    throw new LaproxError(
      'INVALID_ARGUMENT',
      `data is ${show(data)} over a ${buffer.resizable ? 'resizable' : 'growable'} buffer; expected one of fixed length, since native threads read it`,
    )
  }
  return array as TensorDataMap[T]
}

/** The number of elements. */
function checkDims(dims: readonly number[]): number {
  if (!Array.isArray(dims)) throw new LaproxError('INVALID_ARGUMENT', `dims is ${show(dims)}; expected an array of integers`)
  let size = 1
  let empty = false
  for (let i = 0; i < dims.length; i++) {
    const dim: number = dims[i]
    if (!Number.isSafeInteger(dim) || dim < 0) {
      throw new LaproxError('INVALID_ARGUMENT', `dims[${i}] of ${show(dims)} is ${show(dim)}; expected an integer of at least 0`)
    }
    if (dim === 0) empty = true
    else size *= dim
  }
  if (size > Number.MAX_SAFE_INTEGER) {
    throw new LaproxError('INVALID_ARGUMENT', `dims ${show(dims)} have more than ${Number.MAX_SAFE_INTEGER} elements`)
  }
  return empty ? 0 : size
}

function checkStrides(strides: readonly number[], dims: readonly number[]): readonly number[] {
  if (!Array.isArray(strides) || strides.length !== dims.length) {
    throw new LaproxError('INVALID_ARGUMENT', `strides is ${show(strides)}; expected ${dims.length} integers, one for each of dims ${show(dims)}`)
  }
  for (let i = 0; i < strides.length; i++) {
    if (!Number.isSafeInteger(strides[i]) || strides[i] < 0) {
      throw new LaproxError('INVALID_ARGUMENT', `strides[${i}] of ${show(strides)} is ${show(strides[i])}; expected an integer of at least 0`)
    }
  }
  return strides.slice()
}

function checkOffset(offset: number): number {
  if (!Number.isSafeInteger(offset) || offset < 0) {
    throw new LaproxError('INVALID_ARGUMENT', `offset is ${show(offset)}; expected an integer of at least 0`)
  }
  return offset
}

/** Whether the elements lie inside the data. Sums that leave the safe integers are larger than any data, so rounding is harmless. */
function checkExtent(
  layout: { size: number; dims: readonly number[]; strides: readonly number[]; offset: number },
  length: number,
  data: TensorDataMap[TensorType] | undefined,
): void {
  let end = layout.offset
  if (layout.size > 0) {
    end += 1
    for (let i = 0; i < layout.dims.length; i++) end += (layout.dims[i]! - 1) * layout.strides[i]!
  }
  if (end > length) {
    if (data !== undefined) checkAttached(data)
    throw new LaproxError(
      'OUT_OF_BOUNDS',
      `dims ${show(layout.dims)} with strides ${show(layout.strides)} and offset ${layout.offset} need ${end} elements; data has ${length}`,
    )
  }
}

/** Where data is too short for its tensor: is it because its buffer is gone? Node 20 can only tell by trying. */
function checkAttached(data: TensorDataMap[TensorType]): void {
  try {
    new Uint8Array(data.buffer, 0, 0)
  } catch (cause) {
    throw new LaproxError('DETACHED', `data is ${show(data)} over a detached buffer: it was transferred elsewhere`, {
      cause,
    })
  }
}

function wrongLength(data: TensorDataMap[TensorType], dims: readonly number[], size: number): LaproxError {
  checkAttached(data)
  return new LaproxError('INVALID_ARGUMENT', `data is ${show(data)} and dims are ${show(dims)}; expected ${size} elements`)
}

function firstDim(tensor: Tensor): number {
  const count = tensor.dims[0]
  if (count === undefined) throw new LaproxError('INVALID_ARGUMENT', `the tensor ${describe(tensor)} is a scalar; expected a dimension to index`)
  return count
}

function rowMajor(dims: readonly number[]): number[] {
  const strides = dims.slice()
  let stride = 1
  for (let i = dims.length - 1; i >= 0; i--) {
    strides[i] = stride
    stride *= dims[i]!
  }
  return strides
}

/**
 * The elements in row-major order without gaps: a view where they already lie so, a copy otherwise.
 *
 * @throws LaproxError `DISPOSED`, `DETACHED`
 */
export function packed<T extends TensorType>(tensor: Tensor<T>): TensorDataMap[T] {
  const { data, dims, strides, offset, size, type } = tensor
  if (tensor.contiguous) return data.subarray(offset, offset + size) as TensorDataMap[T]
  // The element type is the same on both sides, whatever it is.
  const from = data as Float32Array
  const to = new constructors[type](size) as unknown as Float32Array
  const rank = dims.length
  const inner = dims[rank - 1]!
  const step = strides[rank - 1]!
  const index = new Array<number>(rank).fill(0)
  let row = offset
  for (let written = 0; written < size; written += inner) {
    if (step === 1) to.set(from.subarray(row, row + inner), written)
    else for (let i = 0; i < inner; i++) to[written + i] = from[row + i * step]!
    for (let axis = rank - 2; axis >= 0; axis--) {
      row += strides[axis]!
      if (++index[axis]! < dims[axis]!) break
      row -= dims[axis]! * strides[axis]!
      index[axis] = 0
    }
  }
  return to as unknown as TensorDataMap[T]
}

// One float and its bits.
const one = new Float32Array(1)
const oneBits = new Uint32Array(one.buffer)

/**
 * The elements as float32, in row-major order: always a copy, exact. It runs on the calling thread, at some 10^8 elements a second.
 *
 * @throws LaproxError `INVALID_ARGUMENT` for a type that is no {@link FloatType}, `DISPOSED`, `DETACHED`
 */
export function toFloat32(tensor: Tensor<FloatType>): Float32Array {
  const { type } = tensor
  if (type === 'float32') return packed(tensor as Tensor<'float32'>).slice()
  if (type !== 'float16' && type !== 'bfloat16') throw notFloat('tensor.type', type)
  const from = packed(tensor as Tensor<'float16' | 'bfloat16'>)
  const result = new Float32Array(from.length)
  const out = new Uint32Array(result.buffer)
  if (type === 'bfloat16') {
    for (let i = 0; i < from.length; i++) out[i] = from[i]! << 16
    return result
  }
  for (let i = 0; i < from.length; i++) {
    const half = from[i]!
    const sign = (half & 0x8000) << 16
    const magnitude = half & 0x7fff
    if (magnitude >= 0x7c00) {
      out[i] = sign | 0x7f800000 | (magnitude << 13)
    } else if (magnitude >= 0x0400) {
      out[i] = sign | ((magnitude << 13) + 0x38000000)
    } else {
      result[i] = magnitude * 2 ** -24
      out[i] = out[i]! | sign
    }
  }
  return result
}

/**
 * A tensor of a given type from float32 values: always a copy, rounded to nearest, ties to even. Values beyond the type's
 * range become infinite, NaN stays NaN.
 *
 * @param values the elements in row-major order
 * @param dims their shape
 * @throws LaproxError `INVALID_ARGUMENT` for a type that is no {@link FloatType}, or values that do not fill `dims`
 */
export function fromFloat32<T extends FloatType>(type: T, values: Float32Array, dims: readonly number[]): Tensor<T> {
  const source = checkData('float32', values)
  const size = checkDims(dims)
  if (source.length !== size) throw wrongLength(source, dims, size)
  if (type === 'float32') return new Tensor(type, source.slice() as TensorInput<T>, dims)
  if (type !== 'float16' && type !== 'bfloat16') throw notFloat('type', type)
  const bits = new Uint32Array(source.buffer, source.byteOffset, size)
  const result = new Uint16Array(size)
  if (type === 'float16') for (let i = 0; i < size; i++) result[i] = roundToHalf(bits[i]!)
  else for (let i = 0; i < size; i++) result[i] = roundToBrain(bits[i]!)
  return new Tensor(type, result as TensorInput<T>, dims)
}

/** bfloat16 bits from float32 bits. */
function roundToBrain(bits: number): number {
  if ((bits & 0x7fffffff) > 0x7f800000) return (bits >>> 16) | 0x40
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16
}

/** float16 bits from float32 bits. */
function roundToHalf(bits: number): number {
  const sign = (bits >>> 16) & 0x8000
  const magnitude = bits & 0x7fffffff
  if (magnitude > 0x7f800000) return sign | 0x7e00 | ((magnitude >>> 13) & 0x1ff)
  if (magnitude >= 0x477ff000) return sign | 0x7c00 // 65520 and up
  if (magnitude >= 0x38800000) return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13)
  // Below 2^-14 halves are multiples of 2^-24, which is the spacing of floats at 0.5: adding 0.5 rounds.
  oneBits[0] = magnitude
  one[0] = one[0]! + 0.5
  return sign | (oneBits[0]! - 0x3f000000)
}

function notFloat(name: string, type: unknown): LaproxError {
  return new LaproxError('INVALID_ARGUMENT', `${name} is ${show(type)}; expected float32, float16 or bfloat16`)
}
