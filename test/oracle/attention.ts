import type { Arithmetic } from './arithmetic.js'
import { groupSize, type Layer, type Problem, rowPosition, type Segment, sees } from './problem.js'

/** Attention of one query head over the tokens of its segment, for the rows of the window. */
export interface Attention {
  /** a_h[q, i], [m * n]: zero where row q does not exist or does not see token i. */
  readonly weights: Float64Array
  /** [m] natural log-sum-exp of the logits; NaN for rows that do not exist, -infinity for rows that see nothing. */
  readonly logSumExp: Float64Array
  /** o_h[q] = sum over i of a_h[q, i] v_i, [m * d]. */
  readonly outputs: Float64Array
}

/** The segment whose rows query head h of a sequence attends to. */
export function segmentOf(problem: Problem, layer: Layer, sequence: number, queryHead: number): Segment {
  return layer.segments[sequence * problem.kvHeads + Math.floor(queryHead / groupSize(problem))]!
}

/**
 * a_h[q, i] = exp(s[q, i]) / (exp(sink) + sum over visible j of exp(s[q, j])), s = softCap * tanh(scale * <q, k> / softCap).
 * With a given log-sum-exp, a_h[q, i] = exp(s[q, i] - lse[q]).
 */
export function attention(arithmetic: Arithmetic, problem: Problem, layer: Layer, sequence: number, queryHead: number): Attention {
  const { round, dot } = arithmetic
  const { headDim, rows } = problem
  const segment = segmentOf(problem, layer, sequence, queryHead)
  const n = segment.length
  const queries = layer.queries[sequence]!
  const sink = layer.sinkLogits === undefined ? Number.NEGATIVE_INFINITY : layer.sinkLogits[queryHead]!

  const weights = new Float64Array(rows * n)
  const logSumExp = new Float64Array(rows).fill(Number.NaN)
  const outputs = new Float64Array(rows * headDim)
  for (let q = 0; q < rows; q++) {
    const position = rowPosition(problem, segment, q)
    if (position < 0) continue

    const logits = new Float64Array(n).fill(Number.NEGATIVE_INFINITY)
    let largest = sink
    for (let i = 0; i < n; i++) {
      if (!sees(layer, position, segment, i)) continue
      let logit = round(dot(queries, (queryHead * rows + q) * headDim, segment.keys, i * headDim, headDim) * round(layer.scale))
      if (layer.softCap !== 0) logit = round(layer.softCap * round(Math.tanh(round(logit / layer.softCap))))
      logits[i] = logit
      largest = Math.max(largest, logit)
    }

    const given = layer.logSumExp?.[sequence]?.[queryHead * rows + q]
    if (given !== undefined) {
      logSumExp[q] = given
      for (let i = 0; i < n; i++) {
        if (logits[i] !== Number.NEGATIVE_INFINITY) weights[q * n + i] = round(Math.exp(round(logits[i]! - given)))
      }
    } else if (largest === Number.NEGATIVE_INFINITY) {
      logSumExp[q] = largest
    } else {
      const exponentials = Float64Array.from(logits, (logit) => round(Math.exp(round(logit - largest))))
      const sum = exponentials.reduce((total, e) => round(total + e), round(Math.exp(round(sink - largest))))
      const lse = round(largest + round(Math.log(sum)))
      logSumExp[q] = lse
      for (let i = 0; i < n; i++) {
        weights[q * n + i] = arithmetic.softmax === 'quotient' ? round(exponentials[i]! / sum) : round(Math.exp(round(logits[i]! - lse)))
      }
    }

    for (let i = 0; i < n; i++) {
      const weight = weights[q * n + i]!
      if (weight === 0) continue
      for (let x = 0; x < headDim; x++) {
        outputs[q * headDim + x] = round(outputs[q * headDim + x]! + round(weight * segment.values[i * headDim + x]!))
      }
    }
  }
  return { weights, logSumExp, outputs }
}

/** The layer's output over the window, O = sum over h, i of a_h[:, i] (v_i W_h), [m * D], of one sequence. */
export function layerOutput(arithmetic: Arithmetic, problem: Problem, layer: Layer, sequence: number): Float64Array {
  const { round, project } = arithmetic
  const { queryHeads, headDim, modelDim, rows } = problem
  const out = new Float64Array(rows * modelDim)
  for (let h = 0; h < queryHeads; h++) {
    const { outputs } = attention(arithmetic, problem, layer, sequence, h)
    for (let q = 0; q < rows; q++) {
      const projected = project(outputs.subarray(q * headDim, (q + 1) * headDim), layer.projection, h * headDim * modelDim, modelDim)
      for (let c = 0; c < modelDim; c++) out[q * modelDim + c] = round(out[q * modelDim + c]! + projected[c]!)
    }
  }
  return out
}
