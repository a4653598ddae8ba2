import { afterAll, describe, expect, it } from 'vitest'
import { AttentionModel, Device, type KvCache, type Policy, policies, type Scores, score, Tensor, type Window } from '../lib/index.js'
import type { Problem } from './oracle/problem.js'
import { buildCache, buildModel, buildWindow, INSTRUCTION_SETS, type Layout, OWN_LENGTH_LAYOUTS, SHARED_LENGTH_LAYOUTS } from './support/build.js'
import { expectSameBits, expectScores, segmentsOf } from './support/compare.js'
import { drawShape, GROUP_SIZES, makeProblem, ownLengths, type Shape, sharedLengths } from './support/problem.js'
import { Random } from './support/random.js'

type Rule = Policy['score']

const device = await Device.open('cpu', { threads: 2 })
afterAll(() => device.dispose())

const STATISTICS: readonly Rule[] = [{ statistic: 'joint' }, { statistic: 'bound' }, { statistic: 'removal' }]
const ATTENTION = ['mean', 'sum', 'l2', 'max', 'last', 'none'] as const
const VALUE = ['none', 'l1', 'l2', 'projected-l1', 'projected-l2'] as const
const AGGREGATION = ['mean', 'sum', 'max', 'rss'] as const

function policyFor(rule: Rule, rows: number): Policy {
  return { ...policies.laprox({ keep: 1, window: rows }), score: rule }
}

interface Built {
  readonly model: AttentionModel
  readonly cache: KvCache
  readonly window: Window
}

function build(problem: Problem, shape: Shape, layout: Layout, random: Random, on = device): Built {
  return {
    model: buildModel(on, problem, shape.type, random.chance(0.3)),
    cache: buildCache(on, problem, shape.type, layout, random, { positions: shape.positions, valueNorms: random.chance(0.5) }),
    window: buildWindow(problem, shape.type, shape.givenBase),
  }
}

async function scoreOnce(problem: Problem, shape: Shape, layout: Layout, random: Random, rule: Rule, on = device): Promise<Scores> {
  const { model, cache, window } = build(problem, shape, layout, random, on)
  const scores = await score(model, cache, window, policyFor(rule, shape.rows))
  cache.dispose()
  model.dispose()
  return scores
}

async function check(seed: number, rule: Rule, fixed: Partial<Shape> = {}, layout?: Layout, on = device): Promise<void> {
  const random = new Random(seed)
  const shape = drawShape(random, fixed)
  const problem = makeProblem(random, shape)
  expectScores(await scoreOnce(problem, shape, layout ?? random.pick(SHARED_LENGTH_LAYOUTS), random, rule, on), problem, rule)
}

describe.each(STATISTICS)('$statistic scores', (rule) => {
  it.each([...Array(14).keys()])('follow the formula on random geometry (seed %i)', (seed) => check(1000 + seed, rule))

  it.each(GROUP_SIZES)('follow the formula for groups of %i query heads', (groupSize) =>
    check(groupSize, rule, { groupSize, kvHeads: 2, headDim: 16, modelDim: 48 }),
  )

  it('follow the formula for every head dimension from 8 to 256', async () => {
    for (let headDim = 8; headDim <= 256; headDim += 8) {
      await check(headDim, rule, { headDim, groupSize: 3, kvHeads: 1, layers: 1, sequences: 1, modelDim: 24, rows: 5, lengths: [19] })
    }
  })

  it.each([1, 2, 4, 5, 31, 32, 33, 64, 127, 128])('follow the formula for windows of %i rows', (rows) =>
    check(rows, rule, { rows, groupSize: 2, kvHeads: 2, headDim: 8, modelDim: 16, layers: 2, sequences: 2 }),
  )

  it('follow the formula where the model is narrower than a head, and than a group', async () => {
    for (const modelDim of [1, 3, 8]) await check(modelDim, rule, { modelDim, headDim: 16, groupSize: 4, kvHeads: 2 })
  })

  it('follow the formula for segments longer than a tile, a block and a page', async () => {
    const lengths = [700, 700, 33, 33, 0, 0, 257, 257]
    await check(7, rule, { layers: 2, sequences: 2, kvHeads: 2, groupSize: 2, headDim: 8, modelDim: 16, rows: 8, lengths })
  })

  it('follow the formula for a cache that was thinned before, heads of different lengths', async () => {
    for (const [seed, layout] of OWN_LENGTH_LAYOUTS.entries()) {
      const lengths = ownLengths(new Random(seed), 2, 2, 3, 70)
      await check(50 + seed, rule, { positions: true, layers: 2, sequences: 2, kvHeads: 3, groupSize: 2, lengths }, layout)
    }
  })
})

describe('factored scores', () => {
  it.each(ATTENTION)('follow the formula for %s attention, every value statistic, aggregation and sharing', async (attention) => {
    const random = new Random(ATTENTION.indexOf(attention))
    const shape = drawShape(random, {
      layers: 1,
      sequences: 2,
      kvHeads: 2,
      groupSize: 3,
      headDim: 16,
      modelDim: 20,
      rows: 9,
      lengths: [23, 23, 5, 5],
    })
    const problem = makeProblem(random, shape)
    const { model, cache, window } = build(problem, shape, { kind: 'contiguous' }, random)
    for (const value of VALUE) {
      for (const aggregation of AGGREGATION) {
        for (const sharing of ['group', 'layer'] as const) {
          const rule: Rule = { statistic: 'factored', attention, value, aggregation, sharing }
          expectScores(await score(model, cache, window, policyFor(rule, shape.rows)), problem, rule)
        }
      }
    }
  })

  it.each([...Array(14).keys()])('follow the formula on random geometry (seed %i)', (seed) => {
    const random = new Random(seed)
    return check(2000 + seed, {
      statistic: 'factored',
      attention: random.pick(ATTENTION),
      value: random.pick(VALUE),
      aggregation: random.pick(AGGREGATION),
      sharing: random.pick(['group', 'layer']),
    })
  })

  it('give the KV heads of a layer one score where they share their attention', async () => {
    const random = new Random(5)
    const shape = drawShape(random, { layers: 2, sequences: 1, kvHeads: 3, lengths: [40, 40, 40, 9, 9, 9] })
    const rule: Rule = { statistic: 'factored', attention: 'last', value: 'none', aggregation: 'mean', sharing: 'layer' }
    const scores = await scoreOnce(makeProblem(random, shape), shape, { kind: 'NHD', pageSize: 16 }, random, rule)
    for (const layer of [0, 1]) {
      for (const head of [1, 2]) expectSameBits(scores.segment(layer, 0, head), scores.segment(layer, 0, 0))
    }
  })
})

describe('scores that look at no query', () => {
  it.each([{ statistic: 'key-norm' }, { statistic: 'recency' }] as const)('$statistic follows its formula', async (rule) => {
    for (let seed = 0; seed < 8; seed++) await check(3000 + seed, rule)
    const lengths = ownLengths(new Random(1), 2, 2, 2, 50)
    await check(9, rule, { positions: true, layers: 2, sequences: 2, kvHeads: 2, lengths }, { kind: 'ragged' })
  })

  const randomRule = (seed: number): Rule => ({ statistic: 'random', seed })

  it('random is uniform in [0, 1) and another for every seed, layer, head and position', async () => {
    const random = new Random(11)
    const lengths = Array<number>(8).fill(2000)
    const shape = drawShape(random, { layers: 2, sequences: 2, kvHeads: 2, groupSize: 1, headDim: 8, rows: 1, lengths, type: 'float16' })
    const problem = makeProblem(random, shape)
    const one = segmentsOf(await scoreOnce(problem, shape, { kind: 'contiguous' }, random, randomRule(1)))
    const other = segmentsOf(await scoreOnce(problem, shape, { kind: 'contiguous' }, random, randomRule(2 ** 40 + 1)))
    for (const segment of one) {
      expect(Math.min(...segment)).toBeGreaterThanOrEqual(0)
      expect(Math.max(...segment)).toBeLessThan(1)
      // 2000 uniform numbers: the mean deviates by .0065, a tenth's share by .0067.
      expect(Math.abs(segment.reduce((sum, x) => sum + x, 0) / segment.length - 0.5)).toBeLessThan(0.033)
      for (let tenth = 0; tenth < 10; tenth++) {
        const share = segment.filter((x) => Math.floor(x * 10) === tenth).length / segment.length
        expect(Math.abs(share - 0.1)).toBeLessThan(0.034)
      }
    }
    // Sequences of a batch see the same function; layers, heads and seeds do not.
    expectSameBits(one[2]!, one[0]!)
    const different = [one[0]!, one[1]!, one[4]!, one[5]!, other[0]!]
    for (const [x, first] of different.entries()) {
      for (const second of different.slice(x + 1)) {
        const product = first.reduce((sum, value, i) => sum + (value - 0.5) * (second[i]! - 0.5), 0) / first.length
        expect(Math.abs(product) * 12).toBeLessThan(0.12)
      }
    }
  })

  it('random is a function of the original position, also in a thinned cache', async () => {
    const random = new Random(12)
    const full = drawShape(random, { layers: 1, sequences: 1, kvHeads: 1, rows: 1, lengths: [300], type: 'float32', headDim: 8 })
    const all = await scoreOnce(makeProblem(random, full), full, { kind: 'contiguous' }, random, randomRule(3))
    const thin = { ...full, lengths: [100], positions: true }
    const problem = makeProblem(random, thin)
    const some = await scoreOnce(problem, thin, { kind: 'ragged' }, random, randomRule(3))
    const { positions } = problem.layers[0]!.segments[0]!
    const expected = Float32Array.from(positions, (position) => all.segment(0, 0, 0)[position] ?? Number.NaN)
    for (const [i, value] of expected.entries()) {
      if (!Number.isNaN(value)) expect(some.segment(0, 0, 0)[i]).toBe(value)
    }
  })
})

describe('scores', () => {
  it('are multiplied by the layer weights', async () => {
    const random = new Random(21)
    const shape = drawShape(random, { layers: 3, sequences: 1, kvHeads: 1, lengths: [30, 30, 30] })
    const problem = makeProblem(random, shape)
    const { model, cache, window } = build(problem, shape, { kind: 'contiguous' }, random)
    for (const rule of [...STATISTICS, { statistic: 'key-norm' }] as const) {
      const layerWeights = [0.3, 0, 7]
      const scores = await score(model, cache, window, { ...policyFor(rule, shape.rows), layerWeights })
      expectScores(scores, problem, rule, layerWeights)
    }
  })

  it('follow the formula with soft-cap, sliding window, sink logits and a given log-sum-exp all at once', async () => {
    for (const givenBase of ['e', '2'] as const) {
      for (const rule of STATISTICS) {
        await check(31, rule, {
          layers: 2,
          softCaps: [5, 30],
          slidingWindows: [9, 40],
          hasSinkLogits: [true, false],
          givenBase,
          rows: 16,
          lengths: sharedLengths(new Random(2), 2, 2, 2, 60),
          sequences: 2,
          kvHeads: 2,
          groupSize: 3,
          headDim: 16,
          modelDim: 20,
        })
      }
    }
  })

  it('of rows that see nothing, behind a sliding window in a thinned cache, are zero', async () => {
    const random = new Random(41)
    const shape = drawShape(random, {
      layers: 1,
      sequences: 1,
      kvHeads: 1,
      groupSize: 2,
      headDim: 8,
      rows: 4,
      lengths: [12],
      positions: true,
      slidingWindows: [3],
      type: 'float32',
    })
    const problem = makeProblem(random, shape)
    // All tokens lie far before the window's rows.
    const segment = { ...problem.layers[0]!.segments[0]!, positions: Int32Array.from(Array(12).keys()), contextLength: 500 }
    const blind = { ...problem, layers: [{ ...problem.layers[0]!, segments: [segment], logSumExp: undefined }] }
    for (const rule of STATISTICS) {
      const scores = await scoreOnce(blind, { ...shape, positions: true }, { kind: 'ragged' }, random, rule)
      expect([...scores.data]).toEqual(Array(12).fill(0))
    }
  })

  it('of an empty cache are none', async () => {
    const lengths = [0, 0, 0, 0]
    for (const rule of STATISTICS) await check(42, rule, { layers: 2, sequences: 1, kvHeads: 2, lengths })
  })

  it('of logits far apart and far from zero follow the formula', async () => {
    // Tokens whose logits no sample foresees: a huge key in the middle of a long segment.
    for (const rule of STATISTICS) {
      for (const size of [3, 30, 60]) {
        const random = new Random(43)
        const shape = drawShape(random, {
          layers: 1,
          sequences: 1,
          kvHeads: 1,
          groupSize: 2,
          headDim: 8,
          modelDim: 8,
          rows: 8,
          lengths: [900],
          type: 'float32',
          spread: 1,
        })
        const problem = makeProblem(random, shape)
        const layer = { ...problem.layers[0]!, softCap: 0, slidingWindow: 0, sinkLogits: undefined, logSumExp: undefined }
        for (const at of [333, 512]) {
          const keys = layer.segments[0]!.keys
          for (let i = 0; i < 8; i++) keys[at * 8 + i] = Math.fround(keys[at * 8 + i]! * size)
        }
        const outlying = { ...problem, layers: [layer] }
        const scores = await scoreOnce(outlying, { ...shape, givenBase: undefined } as never, { kind: 'contiguous' }, random, rule)
        expectScores(scores, outlying, rule)
      }
    }
  })

  it('of a group keep a head with a tiny output projection', async () => {
    const random = new Random(45)
    const shape = drawShape(random, {
      layers: 1,
      sequences: 1,
      kvHeads: 1,
      groupSize: 2,
      headDim: 8,
      modelDim: 32,
      type: 'float32',
      lengths: [20],
    })
    const problem = makeProblem(random, shape)
    const layer = problem.layers[0]!
    const projection = layer.projection.map((weight, at) => (at >= 8 * 32 ? Math.fround(weight * 1e-9) : 0))
    const tiny = { ...problem, layers: [{ ...layer, projection }] }
    for (const scale of [0, 1]) {
      // The first head's slice is zero, then of ordinary size, where it must not drown the second.
      const mixed = { ...tiny, layers: [{ ...layer, projection: projection.map((w, at) => (at < 8 * 32 ? scale * layer.projection[at]! : w)) }] }
      for (const rule of STATISTICS) expectScores(await scoreOnce(mixed, shape, { kind: 'contiguous' }, random, rule), mixed, rule)
    }
    const { model, cache, window } = build(
      { ...tiny, layers: [{ ...layer, projection: projection.map((w, at) => (at < 8 * 32 ? layer.projection[at]! : w)) }] },
      shape,
      { kind: 'contiguous' },
      random,
    )
    const rule: Rule = { statistic: 'factored', attention: 'none', value: 'projected-l2', aggregation: 'rss' }
    expect(Math.min(...(await score(model, cache, window, policyFor(rule, shape.rows))).data)).toBeGreaterThan(0)
  })

  it('by ||v W||_1 are refused where the projection has been detached since', async () => {
    const random = new Random(46)
    const shape = drawShape(random, { layers: 1, sequences: 1, kvHeads: 1, groupSize: 2, lengths: [20], type: 'float32' })
    const problem = makeProblem(random, shape)
    const { cache, window } = build(problem, shape, { kind: 'contiguous' }, random)
    const { queryHeads, kvHeads, headDim, modelDim } = problem
    const weights = new Tensor('float32', new Float32Array(modelDim * queryHeads * headDim).fill(1), [modelDim, queryHeads * headDim])
    const model = AttentionModel.create(device, { layers: 1, queryHeads, kvHeads, headDim, outputProjections: [weights] })
    await model.ready
    structuredClone(weights.data, { transfer: [weights.data.buffer as ArrayBuffer] })
    const rule: Rule = { statistic: 'factored', attention: 'mean', value: 'projected-l1', aggregation: 'mean' }
    await expect(score(model, cache, window, policyFor(rule, shape.rows))).rejects.toMatchObject({ code: 'DETACHED' })
  })

  it('need the projection only where the statistic is projected', async () => {
    const random = new Random(44)
    const shape = drawShape(random, { layers: 1, sequences: 1, kvHeads: 2, lengths: [20, 20] })
    const problem = makeProblem(random, shape)
    const { cache, window } = build(problem, shape, { kind: 'contiguous' }, random)
    const { queryHeads, kvHeads, headDim } = problem
    const layer = problem.layers[0]!
    const model = AttentionModel.create(device, {
      layers: 1,
      queryHeads,
      kvHeads,
      headDim,
      scale: layer.scale,
      softCap: layer.softCap,
      slidingWindow: layer.slidingWindow,
      sinkLogits: layer.sinkLogits === undefined ? null : Float32Array.from(layer.sinkLogits),
    } as never)
    const rule: Rule = { statistic: 'factored', attention: 'mean', value: 'l2', aggregation: 'mean' }
    expectScores(await score(model, cache, window, policyFor(rule, shape.rows)), problem, rule)
    await expect(score(model, cache, window, policyFor({ statistic: 'joint' }, shape.rows))).rejects.toMatchObject({
      code: 'UNSUPPORTED',
    })
  })
})

describe.each(INSTRUCTION_SETS)('the %s instructions', (instructionSet) => {
  it('follow the formulas', async (context) => {
    let on: Device
    try {
      on = await Device.open('cpu', { threads: 2, instructionSet })
    } catch (error) {
      expect(error).toMatchObject({ code: 'UNSUPPORTED' })
      return context.skip()
    }
    for (let seed = 0; seed < 6; seed++) {
      for (const rule of STATISTICS) await check(4000 + seed, rule, {}, undefined, on)
      await check(5000 + seed, { statistic: 'factored', attention: 'l2', value: 'projected-l1', aggregation: 'rss' }, {}, undefined, on)
    }
    for (const headDim of [8, 16, 40, 48, 64, 128]) await check(headDim, { statistic: 'joint' }, { type: 'bfloat16', headDim }, undefined, on)
    on.dispose()
  })

  it.for([
    { type: 'float32', headDim: 40, end: 3.4e38 },
    { type: 'bfloat16', headDim: 48, end: 3.38e38 },
  ] as const)(
    'give what the baseline gives where keys or queries in $type are at the ends of their range',
    async ({ type, headDim, end }, context) => {
      const on = await Device.open('cpu', { threads: 1, instructionSet }).catch(() => undefined)
      if (on === undefined) return context.skip()
      using baseline = await Device.open('cpu', { threads: 1, instructionSet: 'baseline' })
      const change = (array: Float64Array, changed: (x: number, i: number) => number) => array.set(array.map(changed))
      const at = (index: number, number: number) => (x: number, i: number) => (i === index ? number : x)
      const changes: Readonly<Record<string, (keys: Float64Array, queries: Float64Array) => void>> = {
        'huge keys': (keys, queries) => {
          change(keys, (x) => x * 2 ** 80)
          change(queries, (x) => x * 2 ** -80)
        },
        'huge queries': (keys, queries) => {
          change(keys, (x) => x * 2 ** -80)
          change(queries, (x) => x * 2 ** 80)
        },
        'subnormal queries': (keys, queries) => {
          change(keys, (x) => x * 2 ** 123)
          change(queries, (x) => x * 2 ** -127)
        },
        'subnormal keys': (keys, queries) => {
          change(keys, (x) => x * 2 ** -127)
          change(queries, (x) => x * 2 ** 123)
        },
        'a key at the end of its range, which no query looks at': (keys, queries) => {
          change(queries, (x, i) => (i % headDim === headDim - 1 ? 0 : x))
          change(keys, at(62 * headDim + headDim - 1, end))
        },
        'a query at the end of its range, which looks at no key': (keys, queries) => {
          change(keys, (x, i) => (i % headDim === 8 ? 0 : x))
          change(queries, at(4 * headDim + 8, end))
        },
        'an infinite key': (keys) => change(keys, at(61 * headDim + 3, Number.POSITIVE_INFINITY)),
        'a key that is NaN': (keys) => change(keys, at(62 * headDim + headDim - 1, Number.NaN)),
        'an infinite query': (_, queries) => change(queries, at(4 * headDim + 8, Number.NEGATIVE_INFINITY)),
        'a query that is NaN': (_, queries) => change(queries, at(4 * headDim + 8, Number.NaN)),
      }
      const { givenBase: _, ...drawn } = drawShape(new Random(77), { type, headDim, layers: 1, sequences: 1, kvHeads: 1, groupSize: 3 })
      const shape: Shape = { ...drawn, rows: 9, lengths: [101], softCaps: [0], slidingWindows: [0], hasSinkLogits: [false] }
      for (const [name, make] of Object.entries(changes)) {
        const problem = makeProblem(new Random(78), shape)
        make(problem.layers[0]!.segments[0]!.keys, problem.layers[0]!.queries[0]!)
        const scores = async (each: Device) => {
          const all = await scoreOnce(problem, shape, SHARED_LENGTH_LAYOUTS[0]!, new Random(1), { statistic: 'joint' }, each)
          return segmentsOf(all).flatMap((segment) => [...segment])
        }
        const ours = await scores(on)
        const plain = await scores(baseline)
        const largest = Math.max(0, ...plain.filter(Number.isFinite))
        for (const [i, value] of ours.entries()) {
          expect(Number.isFinite(value), `${name}, entry ${i}`).toBe(Number.isFinite(plain[i]))
          if (Number.isFinite(value)) expect(Math.abs(value - plain[i]!), `${name}, entry ${i}`).toBeLessThanOrEqual(1e-4 * largest)
        }
      }
      on.dispose()
    },
  )
})
