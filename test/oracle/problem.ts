/**
 * What a score is a function of, in plain float64 arrays: a model, the caches of some sequences and the window's queries.
 * Values are those that the tensors of a test hold after rounding to their type, so that only arithmetic can differ.
 */
export interface Problem {
  readonly layers: readonly Layer[]
  readonly sequences: number
  /** H, a multiple of kvHeads. */
  readonly queryHeads: number
  /** G. */
  readonly kvHeads: number
  /** d. */
  readonly headDim: number
  /** D, the columns of the output projections. */
  readonly modelDim: number
  /** m, the rows of the observation window. */
  readonly rows: number
}

export interface Layer {
  /** W_O, [H * d, D]: feature i of query head h is row h * d + i. */
  readonly projection: Float64Array
  /** Of the logits. */
  readonly scale: number
  /** logit = softCap * tanh(logit / softCap); 0: none. */
  readonly softCap: number
  /** How many tokens a query sees, its own included; 0: all. */
  readonly slidingWindow: number
  /** [H] one more logit in each softmax, or none. */
  readonly sinkLogits: Float64Array | undefined
  /** [S][H * m * d]. */
  readonly queries: readonly Float64Array[]
  /** [S][H * m] natural log-sum-exp over the whole context, where the engine hands it over. */
  readonly logSumExp: readonly Float64Array[] | undefined
  /** [S * G]. */
  readonly segments: readonly Segment[]
}

/** The cached tokens of one (layer, sequence, KV head). */
export interface Segment {
  /** n. */
  readonly length: number
  /** [n * d]. */
  readonly keys: Float64Array
  /** [n * d]. */
  readonly values: Float64Array
  /** [n] original positions, ascending. */
  readonly positions: Int32Array
  /** Tokens of the sequence read so far: the last row of the window stands at contextLength - 1. */
  readonly contextLength: number
}

/** R = H / G. */
export function groupSize(problem: Problem): number {
  return problem.queryHeads / problem.kvHeads
}

/** The position of a row of the window; rows whose position is negative do not exist. */
export function rowPosition(problem: Problem, segment: Segment, row: number): number {
  return segment.contextLength - problem.rows + row
}

/** Whether the query at `position` sees token t of the segment: causal, within the sliding window. */
export function sees(layer: Layer, position: number, segment: Segment, t: number): boolean {
  const distance = position - segment.positions[t]!
  return distance >= 0 && (layer.slidingWindow === 0 || distance < layer.slidingWindow)
}
