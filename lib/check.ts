import { Buffer, constants } from 'node:buffer'
import type { Device } from './device.js'
import { LaproxError, show } from './errors.js'
import { describe, elementBytes, type FloatType, placeOf, Tensor, type TensorType } from './tensor.js'

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
  for (let i = 0; i < value.length; i++) if (!(value[i] instanceof Tensor)) throw wrong(`${at}[${i}]`, value[i], 'a Tensor')
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
  for (let i = 0; i < list.length; i++) if (list[i]!.type !== type) throw wrong(`${at}[${i}]`, list[i], `type ${type}`)
}

/** Checks that tensors are in the memory of a device: host memory, for a CPU. */
export function located(list: readonly (Tensor | undefined)[] | undefined, at: string, device: Device): void {
  if (list === undefined) return
  const wanted = device.backend === 'cuda' ? device : undefined
  for (let i = 0; i < list.length; i++) {
    const tensor = list[i]
    if (tensor === undefined || tensor.device === wanted) continue
    const where = tensor.device === undefined ? 'host memory' : `the memory of ${tensor.device === wanted ? 'another device' : tensor.device.name}`
    const copy = wanted === undefined ? "await tensor.to('cpu')" : 'await tensor.to(device)'
    throw new LaproxError(
      'DEVICE_MISMATCH',
      `${at}[${i}] is ${describe(tensor)} in ${where}; expected ${wanted === undefined ? 'host memory' : `the memory of this ${device.name}`}: ${copy}`,
    )
  }
}

/** What a GPU's loads of whole vectors ask of rows. */
const rowAlignment = 16

/** Checks that the rows of a tensor on a GPU, along the last dimension, begin at multiples of 16 bytes. */
export function alignedRows(tensor: Tensor, list: string, index: number): void {
  const place = placeOf(tensor)
  if (typeof place !== 'number' || tensor.size === 0) return
  const bytes = elementBytes(tensor.type)
  const first = place + tensor.offset * bytes
  const at = (): string => `${list}[${index}]`
  if (first % rowAlignment !== 0) {
    throw new LaproxError('INVALID_ARGUMENT', `${at()} is at 0x${first.toString(16)}; expected a multiple of ${rowAlignment} bytes on a GPU`)
  }
  for (let i = 0; i < tensor.dims.length - 1; i++) {
    const stride = tensor.strides[i]! * bytes
    if (tensor.dims[i]! > 1 && stride % rowAlignment !== 0) {
      throw new LaproxError(
        'INVALID_ARGUMENT',
        `${at()} is ${describe(tensor)} with strides ${show(tensor.strides)}; expected multiples of ${rowAlignment} bytes on a GPU, but for the last`,
      )
    }
  }
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
  const { dims, strides } = tensor
  let stride = 1
  if (dims[dimension]! > 1) stride = strides[dimension]!
  else for (let i = dimension + 1; i < dims.length; i++) stride *= Math.max(dims[i]!, 1)
  return stride * elementBytes(tensor.type)
}

/** Bytes from the first element to the end of the last one. */
export function byteExtent(tensor: Tensor): number {
  if (tensor.size === 0) return 0
  const { dims, strides } = tensor
  let elements = 1
  for (let i = 0; i < dims.length; i++) elements += (dims[i]! - 1) * strides[i]!
  return elements * elementBytes(tensor.type)
}

/** A new typed array, or a buffer, zeroed by the system and not by this thread. */
export function allocate<T>(array: { new (length: number): T; readonly BYTES_PER_ELEMENT?: number }, length: number, at: string): T {
  return allocated(length * (array.BYTES_PER_ELEMENT ?? 1), at, () => new array(length))
}

/** Memory that holds whatever it held: for what is overwritten altogether. */
export function allocateUnset(bytes: number, at: string): ArrayBuffer {
  return allocated(bytes, at, () => (bytes <= constants.MAX_LENGTH ? (Buffer.allocUnsafeSlow(bytes).buffer as ArrayBuffer) : new ArrayBuffer(bytes)))
}

function allocated<T>(bytes: number, at: string, make: () => T): T {
  try {
    return make()
  } catch (cause) {
    throw new LaproxError('OUT_OF_MEMORY', `${at} takes ${bytes} bytes, which could not be allocated`, { cause })
  }
}
