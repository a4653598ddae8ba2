import { afterAll, describe, expect, it } from 'vitest'
import {
  type AttentionModel,
  compact,
  Device,
  evict,
  type KvCache,
  type Policy,
  policies,
  type Scores,
  score,
  select,
  selectFrom,
  Tensor,
  type Window,
} from '../lib/index.js'
import { float64 } from './oracle/arithmetic.js'
import type { Problem } from './oracle/problem.js'
import { scores as oracleScores } from './oracle/score.js'
import { select as oracleSelect, pool } from './oracle/select.js'
import { buildCache, buildModel, buildWindow, INSTRUCTION_SETS, type Layout, OWN_LENGTH_LAYOUTS, SHARED_LENGTH_LAYOUTS } from './support/build.js'
import { changeSegments, drawShape, makeProblem, ownLengths, type Shape } from './support/problem.js'
import { Random } from './support/random.js'

type Rule = Policy['score']

const device = await Device.open('cpu', { threads: 2 })
afterAll(() => device.dispose())

const NO_LSE = { givenBase: undefined } as unknown as Partial<Shape>

interface Setting {
  readonly on: Device
  readonly problem: Problem
  readonly shape: Shape
  readonly model: AttentionModel
  readonly cache: KvCache
  readonly window: Window
}

function setUp(problem: Problem, shape: Shape, layout: Layout = { kind: 'contiguous' }, valueNorms = false, on = device): Setting {
  return {
    on,
    problem,
    shape,
    model: buildModel(on, problem, shape.type),
    cache: buildCache(on, problem, shape.type, layout, new Random(9), { positions: shape.positions, valueNorms }),
    window: buildWindow(problem, shape.type, shape.givenBase),
  }
}

const PLACES = [0, 1, 2].flatMap((layer) => [0, 1, 2, 3].map((segment) => [layer, segment] as const))

/**
 * 18,000 entries of 3 layers, 2 sequences and 2 heads. Attention is as peaked as `spread` says, and alike in all rows of the
 * window, as that of a model is.
 */
function large(seed: number, spread: number, fixed: Partial<Shape> = {}): Setting {
  const random = new Random(seed)
  const shape = drawShape(random, {
    layers: 3,
    sequences: 2,
    kvHeads: 2,
    groupSize: 2,
    headDim: 16,
    modelDim: 24,
    rows: 16,
    type: 'bfloat16',
    spread,
    coherence: 0.7,
    lengths: PLACES.map(([, segment]) => (segment < 2 ? 2000 : 1001)),
    ...NO_LSE,
    softCaps: [],
    slidingWindows: [],
    hasSinkLogits: [],
    scale: 0.25,
    ...fixed,
  })
  return setUp(makeProblem(random, shape), shape, { kind: 'NHD', pageSize: 16 }, seed % 2 === 1)
}

const scoresOf = ({ model, cache, window, shape }: Setting, rule: Rule, layerWeights?: readonly number[]): Promise<Scores> =>
  score(model, cache, window, {
    ...policies.laprox({ keep: 1, window: shape.rows }),
    score: rule,
    ...(layerWeights === undefined ? {} : { layerWeights }),
  })

/** Scores depend on the score rule alone: those of a setting are computed once for all policies that share it. */
async function rememberedScores(setting: Setting, policy: Policy): Promise<Scores> {
  const key = JSON.stringify([policy.score, policy.layerWeights])
  const known = remembered.get(setting) ?? new Map<string, Promise<Scores>>()
  remembered.set(setting, known)
  const scores = known.get(key) ?? scoresOf(setting, policy.score, policy.layerWeights)
  known.set(key, scores)
  return scores
}

const remembered = new WeakMap<Setting, Map<string, Promise<Scores>>>()

/** The pruned selection is, to the bit, that of all exact scores. Returns its report. */
async function expectSameSelection(setting: Setting, policy: Policy) {
  const ranked = await select(await rememberedScores(setting, policy), policy, { device: setting.on })
  const pruned = await selectFrom(setting.model, setting.cache, setting.window, policy)
  expect(pruned.tokens).toEqual(ranked.tokens)
  expect([...pruned.offsets]).toEqual([...ranked.offsets])
  expect(pruned.report).toMatchObject({
    entries: ranked.report.entries,
    kept: ranked.report.kept,
    protectedEntries: ranked.report.protectedEntries,
    nonFinite: ranked.report.nonFinite,
  })
  return pruned.report
}

const VARIANTS: Partial<Policy>[] = [
  {},
  { pooling: { kind: 'none' } },
  { pooling: { kind: 'max', width: 31 } },
  { scope: 'layer' },
  { scope: 'head' },
  { floor: 0.2 },
  { floor: 1 },
  { scope: 'layer', floor: 0.5, pooling: { kind: 'none' } },
  { layerWeights: [1, 0.1, 30] },
  { layerWeights: [0, 1, 0] },
  { scope: 'head', pyramidBeta: 20 },
  { sinks: 0, recent: 0 },
  { pinned: [[100, 110]] },
  { budget: { entries: 500 } },
  { budget: { ratio: 0.03 } },
  { budget: { ratio: 0.2 } },
  { budget: { ratio: 0.9 } },
  { budget: { ratio: 1 } },
]

const named = (variant: Partial<Policy>): string => JSON.stringify(variant)

describe.each(['joint', 'bound'] as const)('the pruned selection by %s', (statistic) => {
  const peaked = large(1, 6)
  const diffuse = large(2, 0.2)
  const policyOf = (variant: Partial<Policy>): Policy => ({
    ...policies.laprox({ keep: 0.05, window: 16 }),
    score: { statistic },
    ...variant,
  })

  it('runs where attention is peaked, and computes few exact scores', async () => {
    const report = await expectSameSelection(peaked, policyOf({}))
    expect(report.path).toBe('pruned')
    expect(report.candidates).toBeGreaterThan(0)
    expect(report.candidates).toBeLessThan(report.entries / 3)
    // Estimates of joint scores leave few to them.
    expect(report.exactScores).toBeLessThan(statistic === 'joint' ? report.candidates / 10 : report.entries / 2)
    if (statistic === 'bound') expect(report.exactScores).toBeGreaterThan(0)
  })

  it.each(VARIANTS.map((variant) => [named(variant), variant] as const))('equals the exhaustive one on peaked attention: %s', async (_, variant) => {
    await expectSameSelection(peaked, policyOf(variant))
  })

  it.each(VARIANTS.map((variant) => [named(variant), variant] as const))('equals the exhaustive one on diffuse attention: %s', async (_, variant) => {
    await expectSameSelection(diffuse, policyOf(variant))
  })
})

describe('the pruned selection', () => {
  const laprox = (variant: Partial<Policy> = {}): Policy => ({ ...policies.laprox({ keep: 0.05, window: 16 }), ...variant })

  it.each(Object.entries(policies))('equals the exhaustive one for the preset %s', async (_, make) => {
    const policy = make({ keep: 0.05, window: 16, recent: 16 })
    await expectSameSelection(large(3, 5), policy)
  })

  const PEAKED = large(4, 6, { coherence: 0.95 })
  const POOLINGS = [{ kind: 'none' }, { kind: 'max', width: 7 }] as const

  it.each([2, 6, 40, 1000])('foresees what no sample does: keys %i times as large', async (size) => {
    const random = new Random(size)
    const { problem, shape } = PEAKED
    // In two heads of twelve, so that bounds still pay.
    const outlying = changeSegments(problem, [PLACES[2]!, PLACES[5]!], ({ keys, length }) => {
      const changed = keys.slice()
      for (let outlier = 0; outlier < 3; outlier++) {
        const at = random.integer(70, length - 70)
        for (let i = 0; i < 16; i++) changed[at * 16 + i]! *= size
      }
      return { keys: changed }
    })
    const setting = setUp(outlying, { ...shape, type: 'float32' })
    for (const pooling of POOLINGS) {
      expect((await expectSameSelection(setting, laprox({ pooling }))).path).toBe('pruned')
      await expectSameSelection(setting, laprox({ pooling, scope: 'layer' }))
      await expectSameSelection(setting, laprox({ pooling, scope: 'head', floor: 0.2 }))
    }
  })

  it.each([10, 30, 45, 60, 100])('holds where one token leaves the others exp(-%i) of the attention', async (gap) => {
    const { problem, shape } = PEAKED
    const places = [PLACES[6]!]
    // In one head all queries share one large component, which only token 0 has: logits are 0.25 <q, k>.
    const layers = problem.layers.map((layer, l) => ({
      ...layer,
      queries: layer.queries.map((queries, sequence) =>
        queries.map((x, at) => {
          const head = Math.floor(at / 16 / 16 / 2)
          return at % 16 === 0 && places.some(([layer, segment]) => layer === l && segment === sequence * 2 + head) ? 8 : x
        }),
      ),
    }))
    const sunk = changeSegments({ ...problem, layers }, places, ({ keys }) => ({
      keys: keys.map((x, at) => (at === 0 ? gap / 2 : at % 16 === 0 ? 0 : x / 4)),
    }))
    const setting = setUp(sunk, { ...shape, type: 'float32' })
    for (const pooling of POOLINGS) {
      const report = await expectSameSelection(setting, laprox({ pooling, sinks: 0, recent: 0 }))
      expect(report.path).toBe('pruned')
      await expectSameSelection(setting, laprox({ pooling, scope: 'layer', sinks: 0, recent: 0 }))
      await expectSameSelection(setting, laprox({ pooling, scope: 'head' }))
      await expectSameSelection(setting, laprox({ pooling, scope: 'head', sinks: 0, recent: 0, budget: { ratio: 0.2 } }))
    }
  })

  it.each(['keys', 'values', 'zeros', 'everything'] as const)('holds among ties: equal %s', async (kind) => {
    const { problem, shape } = PEAKED
    for (const places of [[PLACES[3]!], PLACES]) {
      const tied = changeSegments(problem, places, ({ keys, values }) => ({
        keys: kind === 'keys' || kind === 'everything' ? keys.map((_, at) => keys[at % 16]!) : keys,
        values:
          kind === 'values' || kind === 'everything'
            ? values.map((_, at) => values[at % 16]!)
            : kind === 'zeros'
              ? values.map((x, at) => (at % 64 < 32 ? 0 : x))
              : values,
      }))
      const setting = setUp(tied, shape)
      for (const variant of [{}, { pooling: { kind: 'none' } }, { scope: 'layer', floor: 0.2 }, { scope: 'head' }] as const) {
        await expectSameSelection(setting, laprox(variant))
      }
    }
  })

  it.each([1e-7, 1e-6, 1e-5])('leaves to exact scores what estimates cannot tell apart: scores that differ by %d', async (apart) => {
    const { problem, shape } = PEAKED
    const random = new Random(1)
    // Tokens in sixteens of the same key, and of values that are nearly the same.
    const alike = changeSegments(problem, PLACES, ({ keys, values }) => ({
      keys: keys.map((_, at) => keys[Math.floor(at / 256) * 256 + (at % 16)]!),
      values: values.map((_, at) => values[Math.floor(at / 256) * 256 + (at % 16)]! * (1 + apart * random.next())),
    }))
    const setting = setUp(alike, { ...shape, type: 'float32' })
    let exact = 0
    for (const scope of ['model', 'layer', 'head'] as const) {
      const { path, candidates, exactScores } = await expectSameSelection(setting, laprox({ scope, pooling: { kind: 'none' } }))
      expect(path).toBe('pruned')
      expect(exactScores).toBeLessThan(candidates)
      exact += exactScores
    }
    expect(exact).toBeGreaterThan(16)
  })

  it.each([1e-18, 1e-13, 1e13])('holds with weights of the output projection %d times as large', async (size) => {
    const { problem, shape } = PEAKED
    const layers = problem.layers.map((layer) => ({ ...layer, projection: layer.projection.map((x) => x * size) }))
    const setting = setUp({ ...problem, layers }, { ...shape, type: 'float32' })
    const { path, candidates, exactScores } = await expectSameSelection(setting, laprox())
    expect(path).toBe('pruned')
    // Forms of such weights do not fit float: all are exact.
    expect(exactScores).toBeGreaterThan(candidates / 2)
  })

  it('holds with soft-cap, sliding windows, sink logits and a given log-sum-exp', async () => {
    for (const givenBase of [undefined, 'e', '2'] as const) {
      const setting = large(7, 6, {
        softCaps: [0, 30, 0],
        slidingWindows: [0, 400, 0],
        hasSinkLogits: [false, false, true],
        givenBase,
      } as Partial<Shape>)
      await expectSameSelection(setting, laprox())
      await expectSameSelection(setting, laprox({ pooling: { kind: 'none' }, scope: 'layer' }))
    }
  })

  it.each([7, 16])('holds where exact scores are dear, since %i query heads share an entry', async (groupSize) => {
    const setting = large(groupSize, 6, { groupSize, headDim: 128, coherence: 0.95, modelDim: 24 })
    for (const pooling of POOLINGS) {
      const report = await expectSameSelection(setting, laprox({ pooling }))
      expect(report.path).toBe('pruned')
      expect(report.exactScores).toBeLessThan(report.candidates)
      await expectSameSelection(setting, laprox({ pooling, scope: 'head', floor: 0.2 }))
      await expectSameSelection(setting, laprox({ pooling, score: { statistic: 'bound' } }))
    }
  })

  it('holds for heads of their own lengths in a thinned cache, with norms kept or not', async () => {
    for (const [seed, layout] of OWN_LENGTH_LAYOUTS.entries()) {
      const random = new Random(seed)
      const lengths = ownLengths(random, 3, 2, 2, 2500)
      const shape = drawShape(random, {
        layers: 3,
        sequences: 2,
        kvHeads: 2,
        groupSize: 3,
        headDim: 8,
        rows: 16,
        spread: 6,
        coherence: 0.7,
        lengths,
        positions: true,
        slidingWindows: [],
      })
      const setting = setUp(makeProblem(random, shape), shape, layout, seed % 2 === 0)
      await expectSameSelection(setting, laprox({ recent: 4 }))
      await expectSameSelection(setting, laprox({ recent: 4, pooling: { kind: 'none' } }))
    }
  })

  it.each(INSTRUCTION_SETS)('holds with the %s instructions', async (instructionSet) => {
    const on = await Device.open('cpu', { threads: 2, instructionSet }).catch(() => undefined)
    if (on === undefined) return
    for (const type of ['float32', 'bfloat16'] as const) {
      const { problem, shape } = large(4, 6, { coherence: 0.95, type })
      const setting = setUp(problem, shape, { kind: 'HND', pageSize: 64 }, false, on)
      for (const pooling of POOLINGS) {
        expect((await expectSameSelection(setting, laprox({ pooling }))).path).toBe('pruned')
        await expectSameSelection(setting, laprox({ pooling, scope: 'layer', floor: 0.2, score: { statistic: 'bound' } }))
      }
    }
    on.dispose()
  })

  it('holds on random geometry and policies', async () => {
    let pruned = 0
    for (let seed = 0; seed < 40; seed++) {
      const random = new Random(6000 + seed)
      const shape = drawShape(random, {
        groupSize: random.pick([1, 2, 3, 7]),
        lengths: Array<number>(4).fill(random.pick([20, 300, 600])),
        layers: 2,
        sequences: 1,
        kvHeads: 2,
        spread: random.pick([3, 6, 10]),
        coherence: random.pick([0.5, 0.9]),
      })
      const setting = setUp(makeProblem(random, shape), shape, random.pick(SHARED_LENGTH_LAYOUTS), random.chance(0.5))
      const variant = random.pick(VARIANTS.filter((v) => v.layerWeights === undefined && v.budget === undefined && v.pinned === undefined))
      const statistic = random.pick(['joint', 'joint', 'bound', 'bound', 'removal'] as const)
      const budget = { ratio: random.pick([0.05, 0.1, 0.2]) }
      const rule = laprox({ sinks: 0, recent: 1, score: { statistic }, budget, ...variant, window: shape.rows })
      if ((await expectSameSelection(setting, rule)).path === 'pruned') pruned++
    }
    expect(pruned).toBeGreaterThan(12)
  })

  it('refuses and keeps scores that are not finite as the exhaustive one does', async () => {
    const { problem, shape } = large(8, 6)
    problem.layers[1]!.segments[0]!.values[777 * 16 + 3] = Number.POSITIVE_INFINITY
    problem.layers[2]!.segments[1]!.values[1200 * 16] = Number.NaN
    const setting = setUp(problem, shape)
    const { model, cache, window } = setting
    await expect(selectFrom(model, cache, window, laprox())).rejects.toMatchObject({ code: 'NON_FINITE' })
    const report = await expectSameSelection(setting, laprox({ nonFinite: 'keep' }))
    expect(report.nonFinite).toBe(2)
  })

  it('computes no exact score of a protected entry that no ranked one pools with', async () => {
    const { problem, shape } = large(13, 6)
    const [begin, end] = [400, 600]
    for (const { segments } of problem.layers) for (const { values } of segments) for (let i = begin * 16; i < end * 16; i++) values[i]! *= 100
    const policy = laprox({ budget: { ratio: 0.25 }, pinned: [[begin, end]], pooling: { kind: 'max', width: 7 } })
    const { path, candidates, exactScores, protectedEntries } = await expectSameSelection(setUp(problem, shape), policy)
    expect(path).toBe('pruned')
    expect(protectedEntries).toBeGreaterThan(12 * (end - begin))
    expect(candidates).toBeLessThan(6 * (end - begin))
    expect(exactScores).toBeLessThan(6 * (end - begin))
  })

  it('refuses a protected score that is not finite, though it matters to no choice', async () => {
    const { problem, shape } = large(8, 6)
    problem.layers[1]!.segments[0]!.values[500 * 16 + 3] = Number.NaN
    const setting = setUp(problem, shape)
    const { model, cache, window } = setting
    const pinned = laprox({ budget: { ratio: 0.25 }, pinned: [[400, 600]] })
    await expect(selectFrom(model, cache, window, pinned)).rejects.toMatchObject({ code: 'NON_FINITE' })
    const report = await expectSameSelection(setting, { ...pinned, nonFinite: 'keep' })
    expect(report.nonFinite).toBe(1)
  })

  it('fails on a key that is not finite as the exhaustive one does', async () => {
    const { problem, shape } = large(9, 6)
    problem.layers[0]!.segments[0]!.keys[1500 * 16] = Number.NaN
    const { model, cache, window } = setUp(problem, shape)
    await expect(selectFrom(model, cache, window, laprox())).rejects.toMatchObject({ code: 'NON_FINITE' })
    await expect(evict(model, cache, window, laprox(), { exhaustive: true })).rejects.toMatchObject({ code: 'NON_FINITE' })
  })
})

describe('a selection', () => {
  it('differs from that of float64 scores only among entries within rounding of the threshold', async () => {
    let differing = 0
    for (let seed = 0; seed < 24; seed++) {
      const random = new Random(7000 + seed)
      const shape = drawShape(random, { groupSize: random.pick([1, 2, 3, 4]) })
      const setting = setUp(makeProblem(random, shape), shape)
      const statistic = random.pick(['joint', 'bound', 'removal'] as const)
      const policy: Policy = {
        ...policies.laprox({ keep: 0.4, window: shape.rows, sinks: 0, recent: 0 }),
        score: { statistic },
        pooling: random.pick([{ kind: 'none' }, { kind: 'max', width: 3 }] as const),
      }
      const exact = oracleScores(float64, setting.problem, policy.score)
      const { layers, sequences, kvHeads } = shape
      const expected = oracleSelect({ layers, sequences, kvHeads, scores: exact, bytesPerEntry: 1 }, policy).kept
      const actual = await selectFrom(setting.model, setting.cache, setting.window, policy)
      for (let sequence = 0; sequence < sequences; sequence++) {
        const entries: { score: number; ours: boolean; theirs: boolean }[] = []
        for (let x = 0; x < exact.length; x++) {
          if (Math.floor(x / kvHeads) % sequences !== sequence) continue
          const ours = new Set(actual.kept(Math.floor(x / kvHeads / sequences), sequence, x % kvHeads))
          const theirs = new Set(expected[x])
          for (const [t, score] of pool(exact[x]!, policy.pooling).entries()) entries.push({ score, ours: ours.has(t), theirs: theirs.has(t) })
        }
        const threshold = Math.min(...entries.filter(({ theirs }) => theirs).map(({ score }) => score))
        const largest = Math.max(...entries.map(({ score }) => score))
        for (const { score } of entries.filter(({ ours, theirs }) => ours !== theirs)) {
          if (score > 1e-6 * largest) differing++
          expect(Math.abs(score - threshold)).toBeLessThanOrEqual(2e-5 * threshold + 1e-7 * largest)
        }
      }
    }
    expect(differing).toBeLessThan(20)
  })
})

describe('evict', () => {
  const policy = policies.laprox({ keep: 0.05, window: 16 })

  it('scores, selects and compacts in one call', async () => {
    const setting = large(10, 6)
    const { model, cache, window } = setting
    const ranked = await select(await scoresOf(setting, policy.score), policy, { device })
    for (const exhaustive of [false, true]) {
      const result = await evict(model, cache, window, policy, { exhaustive })
      expect(result.selection.tokens).toEqual(ranked.tokens)
      expect(result.report).toMatchObject({
        entries: cache.entries,
        kept: ranked.entries,
        path: exhaustive ? 'full' : 'pruned',
        bytesBefore: cache.bytes,
        bytesAfter: ranked.entries * 2 * 16 * 2,
      })
      expect(result.cache.entries).toBe(ranked.entries)
      for (const time of [result.report.msScore, result.report.msSelect, result.report.msCompact]) expect(time).toBeGreaterThanOrEqual(0)
      result.cache.dispose()
    }
  })

  it.each(['ragged', 'pages', 'in-place'] as const)('leaves what a selection and a compaction leave: %s', async (target) => {
    // Each in memory of its own.
    const setting = () => {
      const { model, cache, window } = large(14, 6, { positions: true })
      const pool = () => Tensor.zeros('bfloat16', [200, 16, 16])
      const pages = { target: 'pages', keys: [pool()], values: [pool()], freePages: Int32Array.from({ length: 200 }, (_, i) => 199 - i) } as const
      return { model, cache, window, options: target === 'pages' ? pages : { target } }
    }
    const left = (cache: KvCache) =>
      [0, 1, 2].map((layer) => ({
        keys: cache.keys(layer).data,
        values: cache.values(layer).data,
        positions: cache.positions(layer).data,
        // A table of an eviction has room for more.
        pages: target === 'pages' && [...cache.pageTable(layer).data].filter((id) => id !== -1),
        freed: target === 'in-place' && cache.freedPages![layer],
        lengths: cache.lengths(layer),
      }))
    const one = setting()
    const evicted = await evict(one.model, one.cache, one.window, policy, one.options)
    const other = setting()
    const selection = await selectFrom(other.model, other.cache, other.window, policy)
    const compacted = await compact(other.cache, selection, other.options)
    expect(left(evicted.cache)).toEqual(left(compacted))
    expect(evicted.cache.pagesUsed).toEqual(compacted.pagesUsed)
  })

  it('leaves the cache and the pool as they were where there are too few pages', async () => {
    const { model, cache, window } = large(15, 6)
    const before = [0, 1, 2].map((layer) => cache.keys(layer).data.slice())
    const pool = { keys: [Tensor.zeros('bfloat16', [20, 16, 16])], values: [Tensor.zeros('bfloat16', [20, 16, 16])] }
    const freePages = Int32Array.from(Array(20).keys())
    await expect(evict(model, cache, window, policy, { target: 'pages', ...pool, freePages })).rejects.toMatchObject({ code: 'OUT_OF_PAGES' })
    expect([0, 1, 2].map((layer) => cache.keys(layer).data)).toEqual(before)
    for (const { data } of [...pool.keys, ...pool.values]) expect(data.every((bits) => bits === 0)).toBe(true)
  })

  it('keeps floor(ratio * entries) of every sequence', async () => {
    const { model, cache, window } = large(11, 6)
    const { selection } = await evict(model, cache, window, policy)
    for (const [sequence, length] of [2000, 1001].entries()) {
      let kept = 0
      for (let layer = 0; layer < 3; layer++) for (let head = 0; head < 2; head++) kept += selection.kept(layer, sequence, head).length
      expect(kept).toBe(Math.floor(0.05 * length * 6))
    }
  })

  it('evicts again from what it kept, by original positions', async () => {
    const setting = large(12, 6)
    const { model, cache, window } = setting
    const once = await evict(model, cache, window, policies.laprox({ keep: 0.2, window: 16 }))
    const twice = await evict(model, once.cache, window, policies.laprox({ keep: 0.25, window: 16 }))
    for (let layer = 0; layer < 3; layer++) {
      const before = once.cache.positions(layer).data
      const after = twice.cache.positions(layer).data
      const rows = once.cache.cumulativeLengths(layer)
      const kept = twice.cache.cumulativeLengths(layer)
      for (let x = 0; x < 4; x++) {
        const segment = twice.selection.kept(layer, Math.floor(x / 2), x % 2)
        const positions = [...segment].map((token) => before[rows[x]! + token])
        expect([...after.slice(kept[x]!, kept[x + 1]!)]).toEqual(positions)
        // Sinks and the window are still there.
        expect(positions.slice(0, 4)).toEqual([0, 1, 2, 3])
        const length = x < 2 ? 2000 : 1001
        expect(positions.slice(-16)).toEqual(Array.from({ length: 16 }, (_, i) => length - 16 + i))
      }
    }
  })

  it('keeps everything at ratio 1', async () => {
    const { model, cache, window } = large(13, 1)
    const { selection, cache: kept } = await evict(model, cache, window, policies.laprox({ keep: 1, window: 16 }))
    expect(selection.entries).toBe(cache.entries)
    expect(kept.entries).toBe(cache.entries)
  })
})
