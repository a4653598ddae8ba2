import { afterAll, describe, expect, it } from 'vitest'
import { Device, type Policy, policies, type Scores, score, selectFrom } from '../lib/index.js'
import type { Layer, Problem } from './oracle/problem.js'
import { buildCache, buildModel, buildWindow, type Layout, OWN_LENGTH_LAYOUTS, SHARED_LENGTH_LAYOUTS } from './support/build.js'
import { expectSameBits, segmentsOf } from './support/compare.js'
import { drawShape, makeProblem, type Shape, withLogSumExp } from './support/problem.js'
import { Random } from './support/random.js'

type Rule = Policy['score']

const device = await Device.open('cpu', { threads: 2 })
afterAll(() => device.dispose())

const RULES: readonly Rule[] = [
  { statistic: 'joint' },
  { statistic: 'bound' },
  { statistic: 'removal' },
  { statistic: 'factored', attention: 'mean', value: 'none', aggregation: 'mean' },
  { statistic: 'factored', attention: 'l2', value: 'projected-l1', aggregation: 'rss', sharing: 'layer' },
  { statistic: 'key-norm' },
]

interface Setting {
  readonly problem: Problem
  readonly shape: Shape
  readonly layout?: Layout
  readonly valueNorms?: boolean
  readonly seed?: number
}

async function scoreOf({ problem, shape, layout, valueNorms, seed }: Setting, rule: Rule, on = device): Promise<Scores> {
  const model = buildModel(on, problem, shape.type)
  const options = { positions: shape.positions, valueNorms: valueNorms ?? false }
  const cache = buildCache(on, problem, shape.type, layout ?? { kind: 'contiguous' }, new Random(seed ?? 1), options)
  const window = buildWindow(problem, shape.type, shape.givenBase)
  const scores = await score(model, cache, window, { ...policies.laprox({ keep: 1, window: shape.rows }), score: rule })
  cache.dispose()
  model.dispose()
  return scores
}

function draw(seed: number, fixed: Partial<Shape> = {}): { problem: Problem; shape: Shape } {
  const random = new Random(seed)
  const shape = drawShape(random, fixed)
  return { problem: makeProblem(random, shape), shape }
}

const NO_LSE = { givenBase: undefined } as unknown as Partial<Shape>

describe('summed attention', () => {
  it('over all tokens of a head equals the number of its rows that exist', async () => {
    for (let seed = 0; seed < 12; seed++) {
      const { problem, shape } = draw(seed, { ...NO_LSE, hasSinkLogits: [] })
      const rule: Rule = { statistic: 'factored', attention: 'sum', value: 'none', aggregation: 'mean' }
      const scores = segmentsOf(await scoreOf({ problem, shape }, rule))
      for (const [at, segment] of problem.layers.flatMap(({ segments }) => segments).entries()) {
        const total = scores[at]!.reduce((sum, x) => sum + x, 0)
        expect(Math.abs(total - Math.min(shape.rows, segment.length))).toBeLessThanOrEqual(1e-5 * shape.rows)
      }
    }
  })

  it('is what the sink logit leaves', async () => {
    const { problem, shape } = draw(3, { ...NO_LSE, layers: 1, hasSinkLogits: [true], softCaps: [1] })
    // All logits at most 1 in size, a sink logit of 60: nothing is left for the tokens.
    const layer = { ...problem.layers[0]!, sinkLogits: new Float64Array(problem.queryHeads).fill(60) }
    const rule: Rule = { statistic: 'factored', attention: 'sum', value: 'none', aggregation: 'sum' }
    const scores = await scoreOf({ problem: { ...problem, layers: [layer] }, shape }, rule)
    expect(Math.max(0, ...scores.data)).toBeLessThan(1e-20)
  })
})

describe('a group of one query head', () => {
  it('has equal joint and bound scores', async () => {
    for (let seed = 0; seed < 12; seed++) {
      const { problem, shape } = draw(100 + seed, { groupSize: 1 })
      const joint = await scoreOf({ problem, shape }, { statistic: 'joint' })
      const bound = await scoreOf({ problem, shape }, { statistic: 'bound' })
      for (const [i, value] of joint.data.entries()) expect(Math.abs(bound.data[i]! - value)).toBeLessThanOrEqual(2e-6 * value)
    }
  })
})

describe('the bound', () => {
  it('is never below the joint score', async () => {
    for (let seed = 0; seed < 12; seed++) {
      const { problem, shape } = draw(200 + seed)
      const joint = await scoreOf({ problem, shape }, { statistic: 'joint' })
      const bound = await scoreOf({ problem, shape }, { statistic: 'bound' })
      for (const [i, value] of joint.data.entries()) expect(bound.data[i]! - value).toBeGreaterThanOrEqual(-2e-6 * value)
    }
  })
})

describe('the bits of a score', () => {
  it.each(RULES)('are the same in every layout, page size and order of pages ($statistic)', async (rule) => {
    for (let seed = 0; seed < 2; seed++) {
      const { problem, shape } = draw(300 + seed)
      const reference = await scoreOf({ problem, shape }, rule)
      for (const layout of [...SHARED_LENGTH_LAYOUTS, ...OWN_LENGTH_LAYOUTS]) {
        // Another seed lays the pages out in another order.
        const scores = await scoreOf({ problem, shape, layout, seed: seed + 2 }, rule)
        expectSameBits(scores.data, reference.data)
      }
    }
  })

  it.each(RULES)('are the same with positions told and counted ($statistic)', async (rule) => {
    const { problem, shape } = draw(310, { ...NO_LSE, lengths: Array<number>(4).fill(50), layers: 2, sequences: 1, kvHeads: 2 })
    const reference = await scoreOf({ problem, shape }, rule)
    expectSameBits((await scoreOf({ problem, shape: { ...shape, positions: true } }, rule)).data, reference.data)
  })

  it.each(RULES)('are the same on 1, 2 and 7 threads ($statistic)', async (rule) => {
    const { problem, shape } = draw(320, {
      layers: 2,
      sequences: 2,
      kvHeads: 2,
      groupSize: 3,
      headDim: 16,
      rows: 8,
      lengths: [1500, 1500, 40, 40, 900, 900, 0, 0],
    })
    const reference = await scoreOf({ problem, shape }, rule)
    for (const threads of [1, 7]) {
      const on = await Device.open('cpu', { threads })
      expectSameBits((await scoreOf({ problem, shape }, rule, on)).data, reference.data)
      on.dispose()
    }
  })

  it.each(RULES)('of a sequence do not depend on the batch around it ($statistic)', async (rule) => {
    const { problem, shape } = draw(330, { sequences: 3, kvHeads: 2, layers: 2 })
    const batch = await scoreOf({ problem, shape }, rule)
    for (let sequence = 0; sequence < 3; sequence++) {
      const layers = problem.layers.map(
        (layer): Layer => ({
          ...layer,
          queries: layer.queries.slice(sequence, sequence + 1),
          logSumExp: layer.logSumExp?.slice(sequence, sequence + 1),
          segments: layer.segments.slice(sequence * 2, sequence * 2 + 2),
        }),
      )
      const alone = await scoreOf({ problem: { ...problem, sequences: 1, layers }, shape }, rule)
      for (const layer of [0, 1]) {
        for (const head of [0, 1]) expectSameBits(alone.segment(layer, 0, head), batch.segment(layer, sequence, head))
      }
    }
  })

  it.each(RULES)('are the same on every run ($statistic)', async (rule) => {
    const { problem, shape } = draw(340)
    const reference = await scoreOf({ problem, shape }, rule)
    for (let run = 0; run < 3; run++) expectSameBits((await scoreOf({ problem, shape }, rule)).data, reference.data)
  })
})

describe('a given log-sum-exp', () => {
  it.each(['e', '2'] as const)('to base %s gives the scores of a computed one', async (base) => {
    for (let seed = 0; seed < 8; seed++) {
      const { problem, shape } = draw(400 + seed, NO_LSE)
      for (const rule of RULES.slice(0, 4)) {
        const computed = await scoreOf({ problem, shape }, rule)
        const given = await scoreOf({ problem: withLogSumExp(problem, base), shape: { ...shape, givenBase: base } }, rule)
        // The given one is rounded to float32, of numbers up to some tens; removal divides by 1 - a, down to 1e-3.
        const largest = Math.max(...computed.data, 0)
        const rounding = rule.statistic === 'removal' ? 1e-3 : 1e-6
        for (const [i, value] of computed.data.entries()) {
          expect(Math.abs(given.data[i]! - value)).toBeLessThanOrEqual(2e-5 * value + rounding * largest)
        }
      }
    }
  })
})

describe('the bits of a pruned selection', () => {
  it('are the same on 1, 2 and 7 threads and in any order of pages', async () => {
    const { problem, shape } = draw(500, {
      ...NO_LSE,
      layers: 2,
      sequences: 2,
      kvHeads: 2,
      groupSize: 2,
      headDim: 16,
      modelDim: 32,
      rows: 16,
      spread: 5,
      lengths: [2000, 2000, 1200, 1200, 1900, 1900, 64, 64],
      type: 'bfloat16',
    })
    let reference: Int32Array | undefined
    for (const threads of [1, 2, 7]) {
      const on = await Device.open('cpu', { threads })
      for (const seed of [1, 2]) {
        const cache = buildCache(on, problem, shape.type, { kind: 'NHD', pageSize: 16 }, new Random(seed))
        const model = buildModel(on, problem, shape.type)
        const window = buildWindow(problem, shape.type)
        const selection = await selectFrom(model, cache, window, policies.laprox({ keep: 0.1, window: 16 }))
        reference ??= selection.tokens
        expect(selection.tokens).toEqual(reference)
        cache.dispose()
        model.dispose()
      }
      on.dispose()
    }
  })
})
