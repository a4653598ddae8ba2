import { expect } from 'vitest'
import type { Scores } from '../../lib/index.js'
import type { Policy } from '../../lib/policy.js'
import { type Arithmetic, float64, plainFormulations } from '../oracle/arithmetic.js'
import type { Problem } from '../oracle/problem.js'
import { magnitudes, scores as oracle } from '../oracle/score.js'
import { type FloatType, roundTo } from './half.js'

/** The oracle's own rounding: float64 results are compared with float32 ones, whose neighbours lie this far apart. */
const ROUNDING = 2 ** -23

/** Entries whose terms are below this share of the largest ones of their segment are measured by this share. */
const NEGLIGIBLE = 1e-6

/** The room for luck that the worst of some dozen entries has. */
const WORST = 2

interface Deviation {
  /** Root of the mean square of all entries' errors. */
  readonly mean: number
  readonly worst: number
}

/** Errors in units of the terms that each score is made of. */
function deviation(actual: readonly ArrayLike<number>[], exact: readonly Float64Array[], units: readonly Float64Array[]): Deviation {
  let squares = 0
  let entries = 0
  let worst = 0
  for (const [segment, expected] of exact.entries()) {
    const smallest = NEGLIGIBLE * units[segment]!.reduce((most, unit) => Math.max(most, unit), 0)
    for (const [i, value] of expected.entries()) {
      const difference = Math.abs(actual[segment]![i]! - value)
      const error = difference === 0 ? 0 : difference / Math.max(units[segment]![i]!, smallest)
      squares += error * error
      entries++
      // NaN must not pass as a small error.
      worst = error >= 0 ? Math.max(worst, error) : Number.POSITIVE_INFINITY
    }
  }
  return { mean: Math.sqrt(squares / Math.max(1, entries)), worst }
}

/** One array a segment. */
export function segmentsOf(scores: Scores): Float32Array[] {
  const out: Float32Array[] = []
  for (let layer = 0; layer < scores.layers; layer++) {
    for (let sequence = 0; sequence < scores.sequences; sequence++) {
      for (let head = 0; head < scores.kvHeads; head++) out.push(scores.segment(layer, sequence, head))
    }
  }
  return out
}

/** As PyTorch computes in a type of 16 bits: products are added up in float32, and the projected values kept in the type. */
function inType(formulation: Arithmetic, type: FloatType): Arithmetic {
  return { ...formulation, project: (...given) => formulation.project(...given).map((value) => roundTo(type, value)) }
}

/**
 * The error against float64 is at most twice that of plain float32 formulations, plus the oracle's own rounding
 * (design.md section 3), in units of the terms that a score is made of: the mean error, and with more room the worst. A GPU
 * multiplies by projections in the cache's type: `type`.
 */
export function expectScores(
  actual: Scores,
  problem: Problem,
  rule: Policy['score'],
  layerWeights?: readonly number[],
  type: FloatType = 'float32',
): void {
  expectedScores(problem, rule, layerWeights, type)(actual)
}

/** {@link expectScores} for several attempts at one problem. */
export function expectedScores(
  problem: Problem,
  rule: Policy['score'],
  layerWeights?: readonly number[],
  type: FloatType = 'float32',
): (actual: Scores) => void {
  const exact = oracle(float64, problem, rule, layerWeights)
  const units = magnitudes(problem, rule, layerWeights)
  const plain = (type === 'float32' ? plainFormulations : plainFormulations.map((formulation) => inType(formulation, type))).map((formulation) =>
    deviation(oracle(formulation, problem, rule, layerWeights), exact, units),
  )
  return (actual) => {
    const segments = segmentsOf(actual)
    expect(segments.map(({ length }) => length)).toEqual(exact.map(({ length }) => length))
    const ours = deviation(segments, exact, units)
    expect(ours.mean, 'mean error').toBeLessThanOrEqual(2 * Math.max(...plain.map(({ mean }) => mean)) + ROUNDING)
    expect(ours.worst, 'worst error').toBeLessThanOrEqual(WORST * (2 * Math.max(...plain.map(({ worst }) => worst)) + ROUNDING))
  }
}

/** Equal to the last bit: NaN equals NaN of the same pattern, -0 is not +0. */
export function expectSameBits(actual: Float32Array, expected: Float32Array): void {
  const bits = (x: Float32Array): Uint32Array => new Uint32Array(x.buffer, x.byteOffset, x.length)
  expect(bits(actual)).toEqual(bits(expected))
}
