import type { Policy } from '../../lib/policy.js'
import { type Arithmetic, float64, norm1, norm2 } from './arithmetic.js'
import { type Attention, attention } from './attention.js'
import { groupSize, type Layer, type Problem, rowPosition, type Segment } from './problem.js'

type Rule = Policy['score']
type Factored = Extract<Rule, { statistic: 'factored' }>

/**
 * The score of every entry, not pooled: one array a segment, segments numbered (layer * S + sequence) * G + head.
 * The statistic 'random' is no formula and has no oracle.
 */
export function scores(arithmetic: Arithmetic, problem: Problem, rule: Rule, layerWeights?: readonly number[]): Float64Array[] {
  const out: Float64Array[] = []
  for (const [l, layer] of problem.layers.entries()) {
    for (let sequence = 0; sequence < problem.sequences; sequence++) {
      const heads = Array.from({ length: problem.queryHeads }, (_, h) => attention(arithmetic, problem, layer, sequence, h))
      for (let g = 0; g < problem.kvHeads; g++) {
        const segment = scoreSegment(arithmetic, problem, rule, { layer, sequence, g, heads })
        const weight = layerWeights === undefined ? 1 : arithmetic.round(layerWeights[l]!)
        out.push(segment.map((score) => arithmetic.round(score * weight)))
      }
    }
  }
  return out
}

/**
 * The size of the terms that each score is a sum of, laid out as the scores: what its rounding errors are proportional to.
 * Where terms cancel it is larger than the score; [joint] has the [bound] for it, [removal] the norms of what it subtracts.
 */
export function magnitudes(problem: Problem, rule: Rule, layerWeights?: readonly number[]): Float64Array[] {
  if (rule.statistic === 'joint') return scores(float64, problem, { statistic: 'bound' }, layerWeights)
  if (rule.statistic !== 'removal') return scores(float64, problem, rule, layerWeights).map((segment) => segment.map(Math.abs))
  const out: Float64Array[] = []
  for (const [l, layer] of problem.layers.entries()) {
    for (let sequence = 0; sequence < problem.sequences; sequence++) {
      const heads = Array.from({ length: problem.queryHeads }, (_, h) => attention(float64, problem, layer, sequence, h))
      for (let g = 0; g < problem.kvHeads; g++) {
        const segment = layer.segments[sequence * problem.kvHeads + g]!
        const weight = layerWeights?.[l] ?? 1
        out.push(
          Float64Array.from({ length: segment.length }, (_, i) => weight * removalMagnitude(problem, { layer, sequence, g, heads }, segment, i)),
        )
      }
    }
  }
  return out
}

/** One KV head, and the attention of all query heads of its layer and sequence. */
interface Place {
  readonly layer: Layer
  readonly sequence: number
  readonly g: number
  readonly heads: readonly Attention[]
}

function scoreSegment(arithmetic: Arithmetic, problem: Problem, rule: Rule, place: Place): Float64Array {
  const segment = place.layer.segments[place.sequence * problem.kvHeads + place.g]!
  const score = (i: number): number => {
    switch (rule.statistic) {
      case 'joint':
        return (arithmetic.joint === 'matrix' ? joint : jointByPairs)(arithmetic, problem, place, segment, i)
      case 'bound':
        return bound(arithmetic, problem, place, segment, i)
      case 'removal':
        return removal(arithmetic, problem, place, segment, i)
      case 'factored':
        return factored(arithmetic, problem, rule, place, segment, i)
      case 'key-norm':
        return -norm2(arithmetic, row(segment.keys, i, problem.headDim))
      case 'recency':
        return segment.positions[i]!
      case 'random':
        throw new Error('random scores have no oracle')
    }
  }
  return Float64Array.from({ length: segment.length }, (_, i) => score(i))
}

/** [joint] ||C||_F of C = sum over h in the group of a_h[:, i] (x) (v_i W_h), formed as the m x D matrix that it is. */
function joint(arithmetic: Arithmetic, problem: Problem, { layer, g, heads }: Place, segment: Segment, i: number): number {
  const { round } = arithmetic
  const { modelDim, rows } = problem
  const contribution = new Float64Array(rows * modelDim)
  for (const h of group(problem, g)) {
    const projected = projectValue(arithmetic, problem, layer, segment, h, i)
    for (let q = 0; q < rows; q++) {
      const weight = heads[h]!.weights[q * segment.length + i]!
      if (weight === 0) continue
      for (let c = 0; c < modelDim; c++) {
        contribution[q * modelDim + c] = round(contribution[q * modelDim + c]! + round(weight * projected[c]!))
      }
    }
  }
  return norm2(arithmetic, contribution)
}

/** [joint] as sqrt( sum over h, h' in the group of <a_h[:, i], a_h'[:, i]> * <v_i W_h, v_i W_h'> ). */
function jointByPairs(arithmetic: Arithmetic, problem: Problem, { layer, g, heads }: Place, segment: Segment, i: number): number {
  const { round, dot } = arithmetic
  const { modelDim, rows } = problem
  const attended = group(problem, g).map((h) => column(heads[h]!.weights, i, segment.length, rows))
  const projected = group(problem, g).map((h) => projectValue(arithmetic, problem, layer, segment, h, i))
  let sum = 0
  for (let x = 0; x < attended.length; x++) {
    for (let y = 0; y < attended.length; y++) {
      const pair = round(dot(attended[x]!, 0, attended[y]!, 0, rows) * dot(projected[x]!, 0, projected[y]!, 0, modelDim))
      sum = round(sum + pair)
    }
  }
  return round(Math.sqrt(Math.max(0, sum)))
}

/** [bound] sum over h in the group of ||a_h[:, i]|| * ||v_i W_h||. */
function bound(arithmetic: Arithmetic, problem: Problem, { layer, g, heads }: Place, segment: Segment, i: number): number {
  const { round } = arithmetic
  let sum = 0
  for (const h of group(problem, g)) {
    const attentionNorm = norm2(arithmetic, column(heads[h]!.weights, i, segment.length, problem.rows))
    const valueNorm = norm2(arithmetic, projectValue(arithmetic, problem, layer, segment, h, i))
    sum = round(sum + round(attentionNorm * valueNorm))
  }
  return sum
}

/** The smallest 1 - a that [removal] divides by. */
const SMALLEST_REST = 1e-3

/**
 * [removal] ||C||_F of C[q] = sum over h in the group of w_h[q, i] * (o_h[q] - v_i) W_h with w_h = a_h / (1 - a_h): the change of
 * the layer's output when the entry goes and the softmax renormalises. o_h[q] W_h and v_i W_h are formed apart, as whoever
 * does not want m x n differences to project has to.
 */
function removal(arithmetic: Arithmetic, problem: Problem, { layer, g, heads }: Place, segment: Segment, i: number): number {
  const { round } = arithmetic
  const { modelDim, rows } = problem
  const contribution = new Float64Array(rows * modelDim)
  for (const h of group(problem, g)) {
    const value = projectValue(arithmetic, problem, layer, segment, h, i)
    for (let q = 0; q < rows; q++) {
      const a = heads[h]!.weights[q * segment.length + i]!
      if (a === 0) continue
      const weight = round(a / Math.max(round(1 - a), round(SMALLEST_REST)))
      const output = projectOutput(arithmetic, problem, layer, heads[h]!, h, q)
      for (let c = 0; c < modelDim; c++) {
        const change = round(weight * round(output[c]! - value[c]!))
        contribution[q * modelDim + c] = round(contribution[q * modelDim + c]! + change)
      }
    }
  }
  return norm2(arithmetic, contribution)
}

/** ||sum over h of w_h[:, i] (||o_h W_h|| + ||v_i W_h||)||. */
function removalMagnitude(problem: Problem, { layer, g, heads }: Place, segment: Segment, i: number): number {
  const perRow = new Float64Array(problem.rows)
  for (const h of group(problem, g)) {
    const value = norm2(float64, projectValue(float64, problem, layer, segment, h, i))
    for (let q = 0; q < problem.rows; q++) {
      const a = heads[h]!.weights[q * segment.length + i]!
      const output = norm2(float64, projectOutput(float64, problem, layer, heads[h]!, h, q))
      perRow[q]! += (a / Math.max(1 - a, SMALLEST_REST)) * (output + value)
    }
  }
  return norm2(float64, perRow)
}

/** aggregate over h of the attention statistic * aggregate over h of the value statistic. */
function factored(arithmetic: Arithmetic, problem: Problem, rule: Factored, place: Place, segment: Segment, i: number): number {
  const { round } = arithmetic
  const heads = group(problem, place.g)
  const all = Array.from({ length: problem.queryHeads }, (_, h) => h)
  const attended = (rule.sharing === 'layer' ? all : heads).map((h) => attentionStatistic(arithmetic, problem, rule, place, segment, h, i))
  const valued = heads.map((h) => valueStatistic(arithmetic, problem, rule, place.layer, segment, h, i))
  const attentionFactor = rule.attention === 'none' ? 1 : aggregate(arithmetic, rule.aggregation, attended)
  const valueFactor = rule.value === 'none' ? 1 : aggregate(arithmetic, rule.aggregation, valued)
  return round(attentionFactor * valueFactor)
}

/** Over the rows of the window, of query head h on token i. */
function attentionStatistic(arithmetic: Arithmetic, problem: Problem, rule: Factored, place: Place, segment: Segment, h: number, i: number): number {
  const { round } = arithmetic
  const { rows } = problem
  const a = column(place.heads[h]!.weights, i, segment.length, rows)
  const sum = (): number => a.reduce((total, weight) => round(total + weight), 0)
  const existing = a.filter((_, q) => rowPosition(problem, segment, q) >= 0).length
  switch (rule.attention) {
    case 'mean':
      return round(sum() / existing)
    case 'sum':
      return sum()
    case 'l2':
      return norm2(arithmetic, a)
    case 'max':
      return a.reduce((largest, weight) => Math.max(largest, weight), 0)
    case 'last':
      return a[rows - 1]!
    case 'none':
      return 1
  }
}

/** Of token i, seen through the output projection of query head h where the statistic is projected. */
function valueStatistic(arithmetic: Arithmetic, problem: Problem, rule: Factored, layer: Layer, segment: Segment, h: number, i: number): number {
  switch (rule.value) {
    case 'none':
      return 1
    case 'l1':
      return norm1(arithmetic, row(segment.values, i, problem.headDim))
    case 'l2':
      return norm2(arithmetic, row(segment.values, i, problem.headDim))
    case 'projected-l1':
      return norm1(arithmetic, projectValue(arithmetic, problem, layer, segment, h, i))
    case 'projected-l2':
      return norm2(arithmetic, projectValue(arithmetic, problem, layer, segment, h, i))
  }
}

function aggregate({ round }: Arithmetic, kind: Factored['aggregation'], statistics: readonly number[]): number {
  switch (kind) {
    case 'sum':
      return statistics.reduce((sum, x) => round(sum + x), 0)
    case 'mean':
      return round(statistics.reduce((sum, x) => round(sum + x), 0) / statistics.length)
    case 'max':
      return Math.max(...statistics)
    case 'rss':
      return round(Math.sqrt(statistics.reduce((sum, x) => round(sum + round(x * x)), 0)))
  }
}

/** v_i W_h, [D]. */
function projectValue(arithmetic: Arithmetic, problem: Problem, layer: Layer, segment: Segment, h: number, i: number): Float64Array {
  const { headDim, modelDim } = problem
  return arithmetic.project(row(segment.values, i, headDim), layer.projection, h * headDim * modelDim, modelDim)
}

/** o_h[q] W_h, [D]: the same for all tokens, hence remembered. */
function projectOutput(arithmetic: Arithmetic, problem: Problem, layer: Layer, head: Attention, h: number, q: number): Float64Array {
  const { headDim, modelDim } = problem
  let rows = projectedOutputs.get(head)
  if (rows === undefined) {
    rows = []
    projectedOutputs.set(head, rows)
  }
  rows[q] ??= arithmetic.project(row(head.outputs, q, headDim), layer.projection, h * headDim * modelDim, modelDim)
  return rows[q]
}

const projectedOutputs = new WeakMap<Attention, Float64Array[]>()

/** The query heads of KV head g. */
function group(problem: Problem, g: number): number[] {
  const size = groupSize(problem)
  return Array.from({ length: size }, (_, r) => g * size + r)
}

function row(matrix: Float64Array, at: number, columns: number): Float64Array {
  return matrix.subarray(at * columns, (at + 1) * columns)
}

function column(matrix: Float64Array, at: number, columns: number, rows: number): Float64Array {
  return Float64Array.from({ length: rows }, (_, r) => matrix[r * columns + at]!)
}
