import { float64 } from './arithmetic.js'
import { layerOutput } from './attention.js'
import { compacted } from './compact.js'
import type { Layer, Problem } from './problem.js'

/** Squared Frobenius norms of O_kept - O and of O of one layer, over all sequences. */
export interface Squares {
  readonly change: number
  readonly output: number
}

/** The problem whose rows are queries that come after the last token read: `queries` [L][S][H * k * d]. */
export function continued(problem: Problem, rows: number, queries: readonly (readonly Float64Array[])[]): Problem {
  const layers = problem.layers.map(
    (layer, l): Layer => ({
      ...layer,
      queries: queries[l]!,
      logSumExp: undefined,
      segments: layer.segments.map((segment) => ({ ...segment, contextLength: segment.contextLength + rows })),
    }),
  )
  return { ...problem, rows, layers }
}

/** Where only some tokens of each segment are kept, as a compacted cache holds them. */
export function fidelity(problem: Problem, kept: readonly (readonly number[])[]): Squares[] {
  return changes(problem, compacted(problem, kept))
}

/**
 * O is the layers' output over the rows of a problem, O_kept that of the same problem with other segments. Each softmax is over what
 * there is: a given log-sum-exp plays no part.
 */
export function changes(problem: Problem, kept: Problem): Squares[] {
  const own = (layer: Layer): Layer => ({ ...layer, logSumExp: undefined })
  return problem.layers.map((layer, l) => {
    let change = 0
    let output = 0
    for (let sequence = 0; sequence < problem.sequences; sequence++) {
      const full = layerOutput(float64, problem, own(layer), sequence)
      for (const [i, value] of layerOutput(float64, kept, own(kept.layers[l]!), sequence).entries()) {
        change += (value - full[i]!) ** 2
        output += full[i]! ** 2
      }
    }
    return { change, output }
  })
}

/** ||O_kept - O|| / ||O||, of one layer or of several together. */
export function relativeError(squares: readonly Squares[]): number {
  const change = squares.reduce((sum, layer) => sum + layer.change, 0)
  const output = squares.reduce((sum, layer) => sum + layer.output, 0)
  return change === 0 ? 0 : Math.sqrt(change / output)
}
