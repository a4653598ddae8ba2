/** Float16 and bfloat16, written apart from the library so that the two check each other. Rounding is to nearest, ties to even. */
export type FloatType = 'float32' | 'float16' | 'bfloat16'

const float = new Float32Array(1)
const bits = new Uint32Array(float.buffer)

function encodeBfloat16(value: number): number {
  float[0] = value
  const pattern = bits[0]!
  if (Number.isNaN(value)) return (pattern >>> 16) | 0x40
  return (pattern + 0x7fff + ((pattern >>> 16) & 1)) >>> 16
}

function decodeBfloat16(half: number): number {
  bits[0] = half << 16
  return float[0]!
}

function encodeFloat16(value: number): number {
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0
  if (Number.isNaN(value)) return 0x7e00
  const size = Math.abs(value)
  if (size >= 65520) return sign | 0x7c00
  const exponent = Math.max(-14, Math.floor(Math.log2(size)))
  const units = roundToEven(size / 2 ** (exponent - 10))
  // Units of 1024 and more have the implicit bit; a carry out of the mantissa moves into the exponent by itself.
  return sign | (size === 0 ? 0 : units + ((exponent + 14) << 10))
}

function decodeFloat16(half: number): number {
  const sign = half & 0x8000 ? -1 : 1
  const exponent = (half >> 10) & 31
  const mantissa = half & 1023
  if (exponent === 31) return mantissa === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN
  return sign * (exponent === 0 ? mantissa * 2 ** -24 : (1024 + mantissa) * 2 ** (exponent - 25))
}

function roundToEven(value: number): number {
  const below = Math.floor(value)
  const fraction = value - below
  return fraction > 0.5 || (fraction === 0.5 && below % 2 === 1) ? below + 1 : below
}

/** The nearest number that the type has. */
export function roundTo(type: FloatType, value: number): number {
  if (type === 'float32') return Math.fround(value)
  return type === 'float16' ? decodeFloat16(encodeFloat16(Math.fround(value))) : decodeBfloat16(encodeBfloat16(value))
}

/** An array of `length` elements of the type, as the library's tensors hold it. */
export function storage(type: FloatType, length: number): Float32Array | Uint16Array {
  return type === 'float32' ? new Float32Array(length) : new Uint16Array(length)
}

export function write(type: FloatType, data: Float32Array | Uint16Array, at: number, value: number): void {
  data[at] = type === 'float32' ? value : type === 'float16' ? encodeFloat16(value) : encodeBfloat16(value)
}

export function read(type: FloatType, data: ArrayLike<number>, at: number): number {
  const raw = data[at]!
  return type === 'float32' ? raw : type === 'float16' ? decodeFloat16(raw) : decodeBfloat16(raw)
}
