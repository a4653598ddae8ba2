import { LaproxError, show, suggest } from './errors.js'

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
  readonly BYTES_PER_ELEMENT: number
  readonly length: number
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
  return constructors[type].BYTES_PER_ELEMENT
}

/**
 * A typed, strided view of a typed array in host memory, in the vocabulary of onnxruntime-common. It copies nothing: writing
 * to `data` writes to the tensor. Shape, strides and offset never change.
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
  #owner: Tensor | undefined

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
    const array = checkData(type, data)
    const size = checkDims(dims)
    this.type = type
    this.dims = dims.slice()
    this.size = size
    if (layout === undefined) {
      if (array.length !== size) throw wrongLength(array, dims, size)
      this.strides = rowMajor(dims)
      this.offset = 0
    } else {
      this.strides = layout.strides === undefined ? rowMajor(dims) : checkStrides(layout.strides, dims)
      this.offset = layout.offset === undefined ? 0 : checkOffset(layout.offset)
      checkExtent(this, array)
    }
    this.#data = array
    this.#length = array.length
    this.#owner = undefined
  }

  /**
   * A new tensor full of zeros.
   *
   * @throws LaproxError `INVALID_ARGUMENT` for a wrong type or shape, `OUT_OF_MEMORY` where the platform refuses
   */
  static zeros<T extends TensorType>(type: T, dims: readonly number[]): Tensor<T> {
    checkType(type)
    const size = checkDims(dims)
    let data: TensorInput<T>
    try {
      data = new constructors[type](size) as TensorInput<T>
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
    if (data === undefined || this.#owner?.disposed) {
      throw new LaproxError('DISPOSED', `the tensor ${describe(this)} was used after its disposal`)
    }
    if (data.length !== this.#length) {
      throw new LaproxError('DETACHED', `the buffer of the tensor ${describe(this)} has been detached: it was transferred elsewhere`)
    }
    return data
  }

  /** Where the data is: host memory. */
  get location(): 'cpu' {
    return 'cpu'
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

  /** Lets go of the data. Using the tensor, or a view of it, is an error from now on; doing it twice is not. */
  dispose(): void {
    this.#data = undefined
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  /** Whether the tensor, or the one it is a view of, has been disposed of. */
  get disposed(): boolean {
    return this.#data === undefined || this.#owner?.disposed === true
  }

  #view(dims: readonly number[], strides: readonly number[], offset: number): Tensor<T> {
    const data = this.data as TensorInput<T>
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
  data: TensorDataMap[TensorType],
): void {
  let end = layout.offset
  if (layout.size > 0) {
    end += 1
    for (let i = 0; i < layout.dims.length; i++) end += (layout.dims[i]! - 1) * layout.strides[i]!
  }
  if (end > data.length) {
    checkAttached(data)
    throw new LaproxError(
      'OUT_OF_BOUNDS',
      `dims ${show(layout.dims)} with strides ${show(layout.strides)} and offset ${layout.offset} need ${end} elements; data has ${data.length}`,
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
