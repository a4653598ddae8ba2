import { expect, it } from 'vitest'
import { type Policy, policies, score, select } from '../../lib/index.js'
import { buildCache, buildModel, buildWindow, type Layout, OWN_LENGTH_LAYOUTS, SHARED_LENGTH_LAYOUTS } from '../support/build.js'
import { expectedScores, expectSameBits, expectScores } from '../support/compare.js'
import { drawShape, GROUP_SIZES, makeProblem, ownLengths, type Shape, withLogSumExp } from '../support/problem.js'
import { Random } from '../support/random.js'
import { attempt, cpu, Mirror, onGpu, paths, toGpu, windowToGpu } from './gpu.js'

type Rule = Policy['score']

/** Every page size that engines use. */
const LAYOUTS: readonly Layout[] = [
  ...SHARED_LENGTH_LAYOUTS,
  ...[8, 32, 128, 256].flatMap((pageSize): Layout[] => [
    { kind: 'NHD', pageSize },
    { kind: 'HND', pageSize },
  ]),
]

const policyFor = (rule: Rule, rows: number): Policy => ({ ...policies.laprox({ keep: 1, window: rows }), score: rule })

/** Scores of a problem by all kernels, against the oracle; nothing else may have been written to. */
async function check(seed: number, rule: Rule, fixed: Partial<Shape> = {}, layout?: Layout): Promise<void> {
  const random = new Random(seed)
  const shape = drawShape(random, fixed)
  const problem = makeProblem(random, shape)
  const own = buildCache(cpu, problem, shape.type, layout ?? random.pick(LAYOUTS), random, {
    positions: shape.positions,
    valueNorms: random.chance(0.5),
  })
  const expectThem = expectedScores(problem, rule, undefined, shape.type)
  const transposed = random.chance(0.3)
  for (const [kernels, on] of paths) {
    const mirror = new Mirror(on)
    const model = buildModel(on, problem, shape.type, transposed)
    const cache = await toGpu(own, mirror)
    const window = await windowToGpu(buildWindow(problem, shape.type, shape.givenBase), mirror)
    const scores = await score(model, cache, window, policyFor(rule, shape.rows))
    await attempt(`${kernels} kernels, seed ${seed}, ${JSON.stringify({ ...shape, lengths: shape.lengths.join() })}`, async () => {
      expectThem(await scores.to('cpu'))
      expect(await mirror.changed()).toEqual([])
    })
    scores.dispose()
    model.dispose()
    await mirror.dispose()
  }
}

const STATISTICS: readonly Rule[] = [{ statistic: 'joint' }, { statistic: 'bound' }]
const ATTENTION = ['mean', 'sum', 'l2', 'max', 'last', 'none'] as const
const VALUE = ['none', 'l1', 'l2', 'projected-l2'] as const
const AGGREGATION = ['mean', 'sum', 'max', 'rss'] as const

onGpu('scores', () => {
  for (const rule of STATISTICS) {
    it(`${rule.statistic} follow the formula on random geometry`, async () => {
      for (let seed = 0; seed < 8; seed++) await check(1000 + seed, rule)
    })

    it(`${rule.statistic} follow the formula for every group size and for the head dimensions of models`, async () => {
      for (const [i, groupSize] of GROUP_SIZES.entries()) {
        const headDim = [64, 96, 128, 256, 40, 64, 128][i]!
        const type = (['bfloat16', 'float16'] as const)[i % 2]!
        await check(2000 + i, rule, { groupSize, headDim, type, kvHeads: 1, layers: 1, sequences: 2, modelDim: 24, rows: 32, lengths: [33, 70] })
      }
    })
  }

  it('joint follow the formula around the edges of tiles, for windows of any height', async () => {
    for (const [i, rows] of [1, 16, 31, 33, 64, 128].entries()) {
      const n = [1, 63, 64, 65, 127, 257][i]!
      const shape = {
        rows,
        headDim: 64,
        groupSize: 4,
        kvHeads: 1,
        layers: 2,
        sequences: 1,
        modelDim: 32,
        type: 'bfloat16',
        lengths: [n, n + 1],
      } as const
      await check(3000 + i, STATISTICS[0]!, shape)
    }
  })

  it('factored follow the formula', async () => {
    const random = new Random(4)
    for (const attention of ATTENTION) {
      for (const value of VALUE) {
        const rule: Rule = {
          statistic: 'factored',
          attention,
          value,
          aggregation: random.pick(AGGREGATION),
          sharing: random.pick(['group', 'layer']),
        }
        const headDim = random.pick([16, 64])
        await check(random.integer(0, 1e6), rule, {
          layers: 1,
          sequences: 2,
          kvHeads: 2,
          groupSize: 3,
          headDim,
          modelDim: 20,
          rows: 9,
          lengths: [23, 23, 5, 5],
        })
      }
    }
  })

  it('that look at no query follow their formulas', async () => {
    for (const rule of [{ statistic: 'key-norm' }, { statistic: 'recency' }] as const) {
      await check(7, rule)
      await check(
        9,
        rule,
        { positions: true, layers: 2, sequences: 2, kvHeads: 2, lengths: ownLengths(new Random(1), 2, 2, 2, 50) },
        { kind: 'ragged' },
      )
    }
  })

  it('follow the formula for thinned caches, heads of different lengths', async () => {
    for (const [seed, layout] of OWN_LENGTH_LAYOUTS.entries()) {
      const lengths = ownLengths(new Random(seed), 2, 2, 3, 70)
      await check(
        50 + seed,
        STATISTICS[0]!,
        { positions: true, layers: 2, sequences: 2, kvHeads: 3, groupSize: 2, headDim: 64, type: 'bfloat16', lengths },
        layout,
      )
    }
  })
})

for (const [kernels, on] of paths) {
  onGpu(`scores, ${kernels} kernels`, () => {
    it('of logits far apart follow the formula: keys that no sample foresees', async () => {
      for (const size of [3, 30, 60]) {
        const random = new Random(43)
        const shape = drawShape(random, {
          layers: 1,
          sequences: 1,
          kvHeads: 1,
          groupSize: 4,
          headDim: 64,
          modelDim: 16,
          rows: 8,
          lengths: [900],
          type: 'float16',
          spread: 1,
        })
        const problem = makeProblem(random, shape)
        const layer = { ...problem.layers[0]!, softCap: 0, slidingWindow: 0, sinkLogits: undefined, logSumExp: undefined }
        const { keys } = layer.segments[0]!
        for (const at of [333, 512]) for (let i = 0; i < 64; i++) keys[at * 64 + i] = Math.round(keys[at * 64 + i]! * size * 8) / 8
        const outlying = { ...problem, layers: [layer] }
        const mirror = new Mirror(on)
        const model = buildModel(on, outlying, 'float16')
        const cache = await toGpu(buildCache(cpu, outlying, 'float16', { kind: 'contiguous' }, random), mirror)
        const scores = await score(model, cache, await windowToGpu(buildWindow(outlying, 'float16'), mirror), policyFor(STATISTICS[0]!, 8))
        expectScores(await scores.to('cpu'), outlying, STATISTICS[0]!, undefined, 'float16')
        await mirror.dispose()
      }
    })

    it('do not depend on where pages lie, and are the same bits every time', async () => {
      const random = new Random(11)
      const shape = drawShape(random, {
        layers: 2,
        sequences: 2,
        kvHeads: 2,
        groupSize: 4,
        headDim: 128,
        rows: 32,
        type: 'bfloat16',
        lengths: [300, 300, 77, 77, 300, 300, 77, 77],
      })
      const problem = makeProblem(random, { ...shape, givenBase: undefined } as never)
      const model = buildModel(on, problem, 'bfloat16')
      let first: Float32Array | undefined
      for (const [i, layout] of [
        { kind: 'NHD', pageSize: 16 },
        { kind: 'NHD', pageSize: 16 },
        { kind: 'HND', pageSize: 64 },
        { kind: 'contiguous' },
      ].entries()) {
        const mirror = new Mirror(on)
        const cache = await toGpu(buildCache(cpu, problem, 'bfloat16', layout as Layout, new Random(100 + i)), mirror)
        const window = await windowToGpu(buildWindow(problem, 'bfloat16'), mirror)
        for (let run = 0; run < (i === 0 ? 20 : 1); run++) {
          const scores = await score(model, cache, window, policyFor(STATISTICS[0]!, 32))
          const { data } = await scores.to('cpu')
          first ??= data
          expectSameBits(data, first)
          scores.dispose()
        }
        await mirror.dispose()
      }
    })

    it('by a given log-sum-exp are those by the computed one, but for rounding', async () => {
      const random = new Random(12)
      const shape = drawShape(random, {
        layers: 2,
        sequences: 1,
        kvHeads: 2,
        groupSize: 4,
        headDim: 64,
        rows: 16,
        type: 'bfloat16',
        lengths: [500, 500, 90, 90],
      })
      const computed = makeProblem(random, { ...shape, givenBase: undefined } as never)
      for (const base of ['e', '2'] as const) {
        const given = withLogSumExp(computed, base)
        const mirror = new Mirror(on)
        const model = buildModel(on, given, 'bfloat16')
        const cache = await toGpu(buildCache(cpu, given, 'bfloat16', { kind: 'NHD', pageSize: 16 }, random), mirror)
        const by = async (problem: typeof given, lse?: 'e' | '2') =>
          (
            await (
              await score(model, cache, await windowToGpu(buildWindow(problem, 'bfloat16', lse), mirror), policyFor(STATISTICS[0]!, 16))
            ).to('cpu')
          ).data
        const [a, b] = [await by(computed), await by(given, base)]
        const largest = a.reduce((most, x) => Math.max(most, x), 0)
        for (const [i, x] of a.entries()) expect(Math.abs(x - b[i]!)).toBeLessThanOrEqual(2e-3 * x + 1e-6 * largest)
        await mirror.dispose()
      }
    })

    it('are multiplied by layer weights', async () => {
      const random = new Random(13)
      const shape = drawShape(random, { layers: 3, sequences: 1, kvHeads: 1, headDim: 64, lengths: [30, 30, 30] })
      const problem = makeProblem(random, shape)
      const mirror = new Mirror(on)
      const cache = await toGpu(buildCache(cpu, problem, shape.type, { kind: 'contiguous' }, random), mirror)
      const window = await windowToGpu(buildWindow(problem, shape.type, shape.givenBase), mirror)
      const layerWeights = [0.3, 0, 7]
      const scores = await score(buildModel(on, problem, shape.type), cache, window, { ...policyFor(STATISTICS[0]!, shape.rows), layerWeights })
      expectScores(await scores.to('cpu'), problem, STATISTICS[0]!, layerWeights, shape.type)
      await mirror.dispose()
    })

    it('refuse what is not built, by name', async () => {
      const random = new Random(14)
      const shape = drawShape(random, { layers: 1, sequences: 1, kvHeads: 1, lengths: [30] })
      const problem = makeProblem(random, shape)
      const mirror = new Mirror(on)
      const cache = await toGpu(buildCache(cpu, problem, shape.type, { kind: 'contiguous' }, random), mirror)
      const window = await windowToGpu(buildWindow(problem, shape.type), mirror)
      const model = buildModel(on, problem, shape.type)
      for (const rule of [
        { statistic: 'removal' },
        { statistic: 'factored', attention: 'mean', value: 'projected-l1', aggregation: 'mean' },
      ] as const) {
        await expect(score(model, cache, window, policyFor(rule, shape.rows))).rejects.toMatchObject({ code: 'UNSUPPORTED' })
      }
      await mirror.dispose()
    })

    it('are selected on the GPU as on the CPU', async () => {
      const random = new Random(15)
      const shape = drawShape(random, {
        positions: true,
        layers: 2,
        sequences: 2,
        kvHeads: 2,
        headDim: 64,
        lengths: ownLengths(random, 2, 2, 2, 200),
      })
      const problem = makeProblem(random, shape)
      const mirror = new Mirror(on)
      const cache = await toGpu(buildCache(cpu, problem, shape.type, { kind: 'ragged' }, random, { positions: true }), mirror)
      const scores = await score(
        buildModel(on, problem, shape.type),
        cache,
        await windowToGpu(buildWindow(problem, shape.type, shape.givenBase), mirror),
        policyFor(STATISTICS[0]!, shape.rows),
      )
      const policy = policies.laprox({ keep: 0.5, sinks: 2, recent: 3 })
      const [ours, theirs] = [await select(scores, policy), await select(await scores.to('cpu'), policy, { device: cpu })]
      expect((await ours.to('cpu')).tokens).toEqual(theirs.tokens)
      await mirror.dispose()
    })
  })
}
