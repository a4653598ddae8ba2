/**
 * The arithmetics that every formula of the oracle runs in: float64, which is the reference, and float32 rounded after every
 * single operation, which is the plain same-precision formulation that the tolerance of the tests is measured by. Numbers
 * live in Float64Arrays in both; in float32 they hold values that float32 has.
 */
export interface Arithmetic {
  /** How the softmax is written: exp(s - largest) / sum, or exp(s - lse) as engines do that hand over their lse. */
  readonly softmax: 'quotient' | 'log-sum-exp'
  /** How [joint] is written: as the norm of the m x D matrix C, or as the sum over pairs of heads. */
  readonly joint: 'matrix' | 'pairs'
  /** The result of one operation, as this arithmetic keeps it. */
  readonly round: (value: number) => number
  /** sum over i of x[xAt + i] * y[yAt + i], first to last. */
  dot(x: Float64Array, xAt: number, y: Float64Array, yAt: number, length: number): number
  /** out[c] = sum over i of x[i] * matrix[i, c], for a matrix of x.length rows that begins at `at`. */
  project(x: Float64Array, matrix: Float64Array, at: number, columns: number): Float64Array
}

export const float64: Arithmetic = {
  softmax: 'quotient',
  joint: 'matrix',
  round: (value) => value,
  dot(x, xAt, y, yAt, length) {
    let sum = 0
    for (let i = 0; i < length; i++) sum += x[xAt + i]! * y[yAt + i]!
    return sum
  },
  project(x, matrix, at, columns) {
    const out = new Float64Array(columns)
    for (let i = 0; i < x.length; i++) {
      for (let c = 0; c < columns; c++) out[c]! += x[i]! * matrix[at + i * columns + c]!
    }
    return out
  },
}

const fround = Math.fround

export const float32: Arithmetic = {
  softmax: 'quotient',
  joint: 'matrix',
  round: fround,
  dot(x, xAt, y, yAt, length) {
    let sum = 0
    for (let i = 0; i < length; i++) sum = fround(sum + fround(x[xAt + i]! * y[yAt + i]!))
    return sum
  },
  project(x, matrix, at, columns) {
    const out = new Float64Array(columns)
    for (let i = 0; i < x.length; i++) {
      for (let c = 0; c < columns; c++) out[c] = fround(out[c]! + fround(x[i]! * matrix[at + i * columns + c]!))
    }
    return out
  },
}

/** Float32 that adds up products from the last to the first: as plain, with rounding errors of its own. */
const float32Backwards: Arithmetic = {
  ...float32,
  dot(x, xAt, y, yAt, length) {
    let sum = 0
    for (let i = length - 1; i >= 0; i--) sum = fround(sum + fround(x[xAt + i]! * y[yAt + i]!))
    return sum
  },
}

/** The formulas as design.md writes them, in the ways that it does and in two orders: each has rounding errors of its own. */
export const plainFormulations: readonly Arithmetic[] = [
  float32,
  float32Backwards,
  { ...float32, softmax: 'log-sum-exp', joint: 'pairs' },
  { ...float32Backwards, softmax: 'log-sum-exp', joint: 'pairs' },
]

/** Euclidean norm. */
export function norm2({ round, dot }: Arithmetic, x: Float64Array): number {
  return round(Math.sqrt(dot(x, 0, x, 0, x.length)))
}

/** Sum of the absolute values. */
export function norm1({ round }: Arithmetic, x: Float64Array): number {
  let sum = 0
  for (const value of x) sum = round(sum + Math.abs(value))
  return sum
}
