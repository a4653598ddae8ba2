import { LaproxError, show } from './errors.js'
import { describe, elementBytes, type FloatType, Tensor, type TensorType } from './tensor.js'

/** The largest 32-bit integer: lengths, positions and shapes are below it. */
export const maxInt32: number = 2 ** 31 - 1

/** An error for an argument that is not what was expected. */
export function wrong(at: string, value: unknown, expected: string): LaproxError {
  const what = value === undefined ? 'missing' : value instanceof Tensor ? describe(value) : show(value)
  return new LaproxError('INVALID_ARGUMENT', `${at} is ${what}; expected ${expected}`)
}

/** An integer from `least` to `most`. */
export function integer(value: unknown, at: string, least: number, most: number = maxInt32): number {
  if (!Number.isSafeInteger(value) || (value as number) < least || (value as number) > most) {
    throw wrong(at, value, most === maxInt32 ? `an integer of at least ${least}` : `an integer from ${least} to ${most}`)
  }
  return value as number
}

/** A plain object. */
export function object(value: unknown, at: string, expected: string): void {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw wrong(at, value, expected)
}

/** An array with one tensor per layer; `layers` of them where that is known. */
export function tensors(value: unknown, at: string, layers?: number): readonly Tensor[] {
  if (!Array.isArray(value) || value.length === 0) throw wrong(at, value, 'an array with one tensor per layer')
  if (layers !== undefined && value.length !== layers) {
    throw new LaproxError('INVALID_ARGUMENT', `${at} has ${value.length} tensors; expected one per layer, ${layers}`)
  }
  for (const [i, tensor] of value.entries()) if (!(tensor instanceof Tensor)) throw wrong(`${at}[${i}]`, tensor, 'a Tensor')
  return value
}

/** The element type that all of `list` have: one that laprox computes with. */
export function floatType(list: readonly Tensor[], at: string): FloatType {
  const { type } = list[0]!
  if (type !== 'float32' && type !== 'float16' && type !== 'bfloat16') {
    throw wrong(`${at}[0]`, list[0], 'type float32, float16 or bfloat16')
  }
  sameType(list, at, type)
  return type
}

/** Checks the element type of all of `list`. */
export function sameType(list: readonly Tensor[], at: string, type: TensorType): void {
  for (const [i, tensor] of list.entries()) if (tensor.type !== type) throw wrong(`${at}[${i}]`, tensor, `type ${type}`)
}

/** Checks a tensor's shape; -1 stands for any size, and the names of the dimensions say what was expected. */
export function shape(tensor: Tensor, at: string, dims: readonly number[], names: string): void {
  if (tensor.dims.length !== dims.length || dims.some((dim, i) => dim !== -1 && tensor.dims[i] !== dim)) {
    throw wrong(at, tensor, `${names} = [${dims.map((dim) => (dim === -1 ? 'any' : dim)).join(', ')}]`)
  }
}

/** Checks that the rows along the last dimension lie without gaps, as native code reads them. */
export function contiguousRows(tensor: Tensor, at: string): void {
  const last = tensor.dims.length - 1
  if (tensor.dims[last]! > 1 && tensor.strides[last] !== 1) {
    throw new LaproxError(
      'INVALID_ARGUMENT',
      `${at} is ${describe(tensor)} with strides ${show(tensor.strides)}; expected stride 1 along the last dimension`,
    )
  }
}

/** The stride along a dimension in bytes; 0 for dimension -1, which is none. A dimension of one index may have any: it gets the dense one. */
export function byteStride(tensor: Tensor, dimension: number): number {
  if (dimension === -1) return 0
  const dense = tensor.dims.slice(dimension + 1).reduce((product, dim) => product * Math.max(dim, 1), 1)
  return (tensor.dims[dimension]! > 1 ? tensor.strides[dimension]! : dense) * elementBytes(tensor.type)
}

/** Bytes from the first element to the end of the last one. */
export function byteExtent(tensor: Tensor): number {
  if (tensor.size === 0) return 0
  const last = tensor.dims.reduce((sum, dim, i) => sum + (dim - 1) * tensor.strides[i]!, 0)
  return (last + 1) * elementBytes(tensor.type)
}

/** A new typed array, or a buffer, zeroed by the system and not by this thread. */
export function allocate<T>(array: { new (length: number): T; readonly BYTES_PER_ELEMENT?: number }, length: number, at: string): T {
  try {
    return new array(length)
  } catch (cause) {
    const bytes = length * (array.BYTES_PER_ELEMENT ?? 1)
    throw new LaproxError('OUT_OF_MEMORY', `${at} takes ${bytes} bytes, which could not be allocated`, { cause })
  }
}
