import { describe, expect, it } from 'vitest'
import { drawShape, makeProblem } from '../support/problem.js'
import { Random } from '../support/random.js'
import { float32, float64, norm2 } from './arithmetic.js'
import { attention, layerOutput, segmentOf } from './attention.js'
import { continued, fidelity, relativeError } from './fidelity.js'
import { groupSize, type Layer, type Problem } from './problem.js'
import { scores } from './score.js'
import { type Ranking, select } from './select.js'

/** One layer, one head, d = 1: keys and values are numbers. */
function tiny(keys: number[], values: number[], queries: number[], layer: Partial<Layer> = {}): Problem {
  const n = keys.length
  return {
    layers: [
      {
        projection: Float64Array.of(3, 4),
        scale: 1,
        softCap: 0,
        slidingWindow: 0,
        sinkLogits: undefined,
        queries: [Float64Array.from(queries)],
        logSumExp: undefined,
        segments: [
          {
            length: n,
            keys: Float64Array.from(keys),
            values: Float64Array.from(values),
            positions: Int32Array.from(keys.keys()),
            contextLength: n,
          },
        ],
        ...layer,
      },
    ],
    sequences: 1,
    queryHeads: 1,
    kvHeads: 1,
    headDim: 1,
    modelDim: 2,
    rows: queries.length,
  }
}

const weightsOf = (problem: Problem): number[] => [...attention(float64, problem, problem.layers[0]!, 0, 0).weights]
const scoresOf = (problem: Problem, rule: Parameters<typeof scores>[2]): number[] => [...scores(float64, problem, rule)[0]!]

function expectClose(actual: readonly number[], expected: readonly number[]): void {
  expect(actual).toHaveLength(expected.length)
  for (const [i, value] of expected.entries()) expect(actual[i]).toBeCloseTo(value, 12)
}

describe('the oracle, by hand', () => {
  it('takes the softmax over the tokens up to the query', () => {
    // Logits ln 1, ln 2, ln 3; the first row stands at token 1, the second at token 2.
    expectClose(weightsOf(tiny([0, Math.log(2), Math.log(3)], [1, 1, 1], [1, 1])), [1 / 3, 2 / 3, 0, 1 / 6, 2 / 6, 3 / 6])
  })

  it('leaves out rows before the first token', () => {
    expectClose(weightsOf(tiny([0, 0], [1, 1], [5, 5, 1, 1])), [0, 0, 0, 0, 1, 0, 0.5, 0.5])
  })

  it('applies the sink logit, the sliding window and the soft-cap', () => {
    const keys = [0, Math.log(2), Math.log(3)]
    expectClose(weightsOf(tiny(keys, keys, [1], { sinkLogits: Float64Array.of(Math.log(4)) })), [0.1, 0.2, 0.3])
    expectClose(weightsOf(tiny(keys, keys, [1], { slidingWindow: 2 })), [0, 0.4, 0.6])
    const capped = [0, Math.tanh(Math.log(2)), Math.tanh(Math.log(3))].map(Math.exp)
    const total = capped.reduce((sum, x) => sum + x, 0)
    expectClose(
      weightsOf(tiny(keys, keys, [1], { softCap: 1 })),
      capped.map((x) => x / total),
    )
  })

  it('takes a given log-sum-exp instead of its own', () => {
    const given = tiny([0, Math.log(2)], [1, 1], [1], { logSumExp: [Float64Array.of(Math.log(6))] })
    expectClose(weightsOf(given), [1 / 6, 2 / 6])
  })

  it('scores by each statistic', () => {
    // a = 1/4, 3/4; v = 1, -2; ||W|| = 5, |W|_1 = 7; o = -5/4.
    const problem = tiny([0, Math.log(3)], [1, -2], [1])
    expectClose(scoresOf(problem, { statistic: 'joint' }), [5 / 4, 30 / 4])
    expectClose(scoresOf(problem, { statistic: 'bound' }), [5 / 4, 30 / 4])
    expectClose(scoresOf(problem, { statistic: 'removal' }), [(1 / 3) * (9 / 4) * 5, 3 * (3 / 4) * 5])
    expectClose(scoresOf(problem, { statistic: 'key-norm' }), [-0, -Math.log(3)])
    expectClose(scoresOf(problem, { statistic: 'recency' }), [0, 1])
    const grid = { statistic: 'factored', attention: 'mean', value: 'projected-l1', aggregation: 'mean' } as const
    expectClose(scoresOf(problem, grid), [7 / 4, 42 / 4])
    expectClose(scoresOf(problem, { ...grid, value: 'l1' }), [1 / 4, 6 / 4])
    expectClose(scoresOf(problem, { ...grid, attention: 'none', value: 'projected-l2' }), [5, 10])
  })

  it('measures what keeping changes, over the window and later queries', () => {
    // a = 1/4, 3/4; v = 1, -2; W = (3, 4); o = -5/4, and 1 where the first is kept.
    const problem = tiny([0, Math.log(3)], [1, -2], [1])
    expect(fidelity(problem, [[0]])).toEqual([{ change: expect.closeTo((25 * 81) / 16, 12), output: expect.closeTo((25 * 25) / 16, 12) }])
    expect(relativeError(fidelity(problem, [[0]]))).toBeCloseTo(9 / 5, 12)
    expect(relativeError(fidelity(problem, [[]]))).toBe(1)
    expect(relativeError(fidelity(problem, [[0, 1]]))).toBe(0)
    // The next query but one no longer sees the first token.
    const next = continued(tiny([0, 0], [1, -2], [1], { slidingWindow: 3 }), 2, [[Float64Array.of(1, 1)]])
    expect(fidelity(next, [[1]])).toEqual([{ change: expect.closeTo(25 * (9 / 4), 12), output: expect.closeTo(25 * (1 / 4 + 4), 12) }])
  })

  it('takes attention statistics over the rows that exist', () => {
    // Rows: none; [1, 0]; [1/2, 1/2].
    const problem = tiny([0, 0], [1, 1], [9, 1, 1])
    const grid = { statistic: 'factored', value: 'none', aggregation: 'mean' } as const
    expectClose(scoresOf(problem, { ...grid, attention: 'mean' }), [3 / 4, 1 / 4])
    expectClose(scoresOf(problem, { ...grid, attention: 'sum' }), [3 / 2, 1 / 2])
    expectClose(scoresOf(problem, { ...grid, attention: 'l2' }), [Math.sqrt(5) / 2, 1 / 2])
    expectClose(scoresOf(problem, { ...grid, attention: 'max' }), [1, 1 / 2])
    expectClose(scoresOf(problem, { ...grid, attention: 'last' }), [1 / 2, 1 / 2])
  })
})

describe('the oracle, by identities', () => {
  const problems = Array.from({ length: 12 }, (_, seed) => {
    const random = new Random(seed)
    return makeProblem(random, drawShape(random, { type: 'float32' }))
  })

  it("joint equals the Gram form sqrt(sum over h, h' of <a_h, a_h'> (v M_hh' v^T))", () => {
    for (const problem of problems) {
      const direct = scores(float64, problem, { statistic: 'joint' })
      for (const [at, gram] of gramJoint(problem).entries()) {
        for (const [i, value] of gram.entries()) expect(direct[at]![i]).toBeCloseTo(value, 9)
      }
    }
  })

  it('joint is the change of the layer output when the value row is taken away', () => {
    for (const problem of problems) {
      const [layer] = problem.layers
      if (layer === undefined || layer.segments[0]!.length === 0) continue
      const expected = scores(float64, problem, { statistic: 'joint' })[0]!
      const before = layerOutput(float64, problem, layer, 0)
      const i = Math.floor(expected.length / 2)
      const [segment, ...others] = layer.segments
      const values = segment!.values.slice().fill(0, i * problem.headDim, (i + 1) * problem.headDim)
      const after = layerOutput(float64, problem, { ...layer, segments: [{ ...segment!, values }, ...others] }, 0)
      const change = norm2(
        float64,
        after.map((x, at) => x - before[at]!),
      )
      expect(Math.abs(change - expected[i]!)).toBeLessThanOrEqual(1e-12 * norm2(float64, before))
    }
  })

  it('removal is the change of the layer output when the entry goes', () => {
    const random = new Random(99)
    const problem = makeProblem(
      random,
      drawShape(random, { layers: 1, sequences: 1, kvHeads: 1, groupSize: 3, lengths: [9], type: 'float32', rows: 4, spread: 1, headDim: 8 }),
    )
    const layer = { ...problem.layers[0]!, logSumExp: undefined, softCap: 0, slidingWindow: 0, sinkLogits: undefined }
    const plain = { ...problem, layers: [layer] }
    const before = layerOutput(float64, plain, layer, 0)
    const segment = layer.segments[0]!
    const expected = scores(float64, plain, { statistic: 'removal' })[0]!
    for (let i = 0; i < 5; i++) {
      const rows = [...Array(segment.length).keys()].filter((t) => t !== i)
      const pickRows = (matrix: Float64Array): Float64Array => Float64Array.from(rows.flatMap((t) => [...matrix.subarray(t * 8, (t + 1) * 8)]))
      const without = {
        ...segment,
        length: segment.length - 1,
        keys: pickRows(segment.keys),
        values: pickRows(segment.values),
        positions: Int32Array.from(rows),
      }
      const after = layerOutput(float64, plain, { ...layer, segments: [without] }, 0)
      const change = norm2(
        float64,
        after.map((x, at) => x - before[at]!),
      )
      expect(expected[i]! / change).toBeCloseTo(1, 9)
    }
  })

  it('float32 follows float64 within rounding', () => {
    for (const problem of problems) {
      const exact = scores(float64, problem, { statistic: 'joint' }).flatMap((x) => [...x])
      const plain = scores(float32, problem, { statistic: 'joint' }).flatMap((x) => [...x])
      const largest = Math.max(0, ...exact)
      for (const [i, value] of exact.entries()) expect(Math.abs(plain[i]! - value)).toBeLessThanOrEqual(1e-4 * largest)
    }
  })
})

describe('the oracle selects', () => {
  const policy = {
    name: 'test',
    window: 1,
    score: { statistic: 'recency' },
    pooling: { kind: 'none' },
    scope: 'model',
    budget: { entries: 3 },
    floor: 0,
    sinks: 0,
    recent: 0,
    pinned: [],
    nonFinite: 'error',
  } as const
  const ranking = (scores: number[][], layers: number): Ranking => ({
    layers,
    sequences: 1,
    kvHeads: scores.length / layers,
    scores,
    bytesPerEntry: 4,
  })

  it('the largest scores, the smaller (layer, head, token) first', () => {
    expect(
      select(
        ranking(
          [
            [1, 5, 1],
            [5, 1, 1],
          ],
          2,
        ),
        policy,
      ).kept,
    ).toEqual([[0, 1], [0]])
  })

  it('maxima of neighbours, truncated at the ends', () => {
    expect(select(ranking([[9, 0, 0, 1, 0, 0, 2]], 1), { ...policy, pooling: { kind: 'max', width: 3 } }).kept).toEqual([[0, 1, 5]])
  })

  it('within each scope its share', () => {
    const two = ranking(
      [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
      ],
      2,
    )
    expect(select(two, { ...policy, budget: { ratio: 0.5 } }).kept).toEqual([[], [0, 1, 2, 3]])
    expect(select(two, { ...policy, budget: { ratio: 0.5 }, scope: 'layer' }).kept).toEqual([
      [2, 3],
      [2, 3],
    ])
    expect(select(two, { ...policy, budget: { ratio: 0.5 }, floor: 0.5 }).kept).toEqual([[3], [1, 2, 3]])
    expect(select(two, { ...policy, budget: { entries: 3 }, scope: 'head' }).kept).toEqual([[2, 3], [3]])
    expect(select(two, { ...policy, budget: { ratio: 0.5 }, sinks: 1 }).kept).toEqual([[0], [0, 2, 3]])
  })
})

/** [joint] of every segment from Gram matrices M_hh' = W_h W_h'^T, which never form a row of D elements. */
function gramJoint(problem: Problem): number[][] {
  const { headDim: d, modelDim, rows, sequences, kvHeads } = problem
  return problem.layers.flatMap((layer) =>
    Array.from({ length: sequences * kvHeads }, (_, at) => {
      const sequence = Math.floor(at / kvHeads)
      const heads = Array.from({ length: groupSize(problem) }, (_, r) => (at % kvHeads) * groupSize(problem) + r)
      const attended = heads.map((h) => attention(float64, problem, layer, sequence, h).weights)
      const { length, values } = segmentOf(problem, layer, sequence, heads[0]!)
      const squares = new Float64Array(length)
      for (const [x, h] of heads.entries()) {
        for (const [y, k] of heads.entries()) {
          const gram = Float64Array.from({ length: d * d }, (_, ab) =>
            float64.dot(layer.projection, (h * d + Math.floor(ab / d)) * modelDim, layer.projection, (k * d + (ab % d)) * modelDim, modelDim),
          )
          for (let i = 0; i < length; i++) {
            let both = 0
            for (let q = 0; q < rows; q++) both += attended[x]![q * length + i]! * attended[y]![q * length + i]!
            const v = values.subarray(i * d, (i + 1) * d)
            squares[i]! += both * float64.dot(float64.project(v, gram, 0, d), 0, v, 0, d)
          }
        }
      }
      return [...squares].map((square) => Math.sqrt(Math.max(0, square)))
    }),
  )
}
