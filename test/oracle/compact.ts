import { float64 } from './arithmetic.js'
import { attention } from './attention.js'
import type { Layer, Problem, Segment } from './problem.js'

/** The problem with only the kept tokens of each segment, as a compacted cache holds them: rows move, positions stay. */
export function compacted(problem: Problem, kept: readonly (readonly number[])[]): Problem {
  const { headDim } = problem
  const perLayer = problem.sequences * problem.kvHeads
  const layers = problem.layers.map(
    (layer, l): Layer => ({
      ...layer,
      segments: layer.segments.map((segment, at): Segment => {
        const tokens = kept[l * perLayer + at]!
        const rows = (matrix: Float64Array): Float64Array =>
          Float64Array.from(tokens.flatMap((t) => [...matrix.subarray(t * headDim, (t + 1) * headDim)]))
        return {
          length: tokens.length,
          keys: rows(segment.keys),
          values: rows(segment.values),
          positions: Int32Array.from(tokens, (t) => segment.positions[t]!),
          contextLength: segment.contextLength,
        }
      }),
    }),
  )
  return { ...problem, layers }
}

/**
 * Attention outputs [m * d] of every (layer, sequence, query head) where dropped tokens are masked: what attention over a
 * compacted cache must give. Dropping is done by the mask alone: the full cache is what is read.
 */
export function maskedOutputs(problem: Problem, kept: readonly (readonly number[])[]): Float64Array[] {
  const { headDim, rows, queryHeads, kvHeads, sequences } = problem
  const out: Float64Array[] = []
  for (const [l, layer] of problem.layers.entries()) {
    for (let sequence = 0; sequence < sequences; sequence++) {
      for (let h = 0; h < queryHeads; h++) {
        const at = sequence * kvHeads + Math.floor((h * kvHeads) / queryHeads)
        const segment = layer.segments[at]!
        const keeps = new Set(kept[l * sequences * kvHeads + at])
        const { weights } = attention(float64, problem, layer, sequence, h)
        const outputs = new Float64Array(rows * headDim)
        for (let q = 0; q < rows; q++) {
          let total = 0
          for (let t = 0; t < segment.length; t++) if (keeps.has(t)) total += weights[q * segment.length + t]!
          for (let t = 0; t < segment.length && total > 0; t++) {
            if (!keeps.has(t)) continue
            const weight = weights[q * segment.length + t]! / total
            for (let i = 0; i < headDim; i++) outputs[q * headDim + i]! += weight * segment.values[t * headDim + i]!
          }
        }
        out.push(outputs)
      }
    }
  }
  return out
}

/** Attention outputs of every (layer, sequence, query head) over all tokens there are. */
export function outputs(problem: Problem): Float64Array[] {
  return problem.layers.flatMap((layer) =>
    Array.from({ length: problem.sequences }, (_, sequence) =>
      Array.from({ length: problem.queryHeads }, (_, h) => attention(float64, problem, layer, sequence, h).outputs),
    ).flat(),
  )
}
