import { expect, it } from 'vitest'
import {
  AttentionModel,
  Device,
  evict,
  KvCache,
  type Policy,
  policies,
  type Scores,
  score,
  select,
  selectFrom,
  Tensor,
  type Window,
} from '../../lib/index.js'
import type { Problem } from '../oracle/problem.js'
import { buildCache, buildModel, buildWindow, type Layout, OWN_LENGTH_LAYOUTS, SHARED_LENGTH_LAYOUTS } from '../support/build.js'
import { changeSegments, drawShape, makeProblem, ownLengths, type Shape } from '../support/problem.js'
import { Random } from '../support/random.js'
import { readRows } from '../support/read.js'
import { attempt, cpu, Mirror, onGpu, paths, toGpu, toHost, windowToGpu } from './gpu.js'

interface Setting {
  readonly on: Device
  readonly problem: Problem
  readonly shape: Shape
  readonly mirror: Mirror
  readonly model: AttentionModel
  readonly cache: KvCache
  readonly window: Window
}

async function setUp(on: Device, problem: Problem, shape: Shape, layout: Layout, valueNorms: boolean): Promise<Setting> {
  const mirror = new Mirror(on)
  const host = buildCache(cpu, problem, shape.type, layout, new Random(9), { positions: shape.positions, valueNorms })
  return {
    on,
    problem,
    shape,
    mirror,
    model: buildModel(on, problem, shape.type),
    cache: await toGpu(host, mirror),
    window: await windowToGpu(buildWindow(problem, shape.type, shape.givenBase), mirror),
  }
}

/** 9,000 entries of 3 layers, 2 sequences and 2 heads of a model whose attention is as peaked as `spread` says. */
const PLACES = [0, 1, 2].flatMap((layer) => [0, 1, 2, 3].map((segment) => [layer, segment] as const))
function makeLarge(seed: number, spread: number, fixed: Partial<Shape> = {}): { problem: Problem; shape: Shape } {
  const random = new Random(seed)
  const shape = drawShape(random, {
    layers: 3,
    sequences: 2,
    kvHeads: 2,
    groupSize: 4,
    headDim: 64,
    modelDim: 24,
    rows: 32,
    type: 'bfloat16',
    spread,
    coherence: 0.7,
    lengths: PLACES.map(([, segment]) => (segment < 2 ? 1000 : 501)),
    givenBase: undefined,
    softCaps: [],
    slidingWindows: [],
    hasSinkLogits: [],
    scale: 0.125,
    ...fixed,
  } as unknown as Partial<Shape>)
  return { problem: makeProblem(random, shape), shape }
}

const VARIANTS: Partial<Policy>[] = [
  {},
  { pooling: { kind: 'none' } },
  { pooling: { kind: 'max', width: 31 } },
  { pooling: { kind: 'mean', width: 5 } },
  { scope: 'layer' },
  { scope: 'head' },
  { floor: 0.2 },
  { scope: 'layer', floor: 0.5, pooling: { kind: 'none' } },
  { layerWeights: [1, 0.1, 30] },
  { layerWeights: [0, 1, 0] },
  { scope: 'head', pyramidBeta: 20 },
  { sinks: 0, recent: 0 },
  { pinned: [[100, 110]], budget: { ratio: 0.1 } },
  { budget: { entries: 500 } },
  { budget: { ratio: 0.03 }, recent: 4 },
  { budget: { ratio: 0.9 } },
  { budget: { ratio: 1 } },
]

const laprox = (variant: Partial<Policy> = {}): Policy => ({ ...policies.laprox({ keep: 0.05, window: 32, recent: 16 }), ...variant })

/** The selection straight from the cache is, to the bit, that of all exact scores, on the GPU and on the CPU. */
async function expectSame(setting: Setting, all: readonly Policy[]): Promise<string[]> {
  const known = new Map<string, [Scores, Scores]>()
  const reports: string[] = []
  for (const policy of all) {
    await attempt(JSON.stringify(policy), async () => {
      const key = JSON.stringify([policy.score, policy.layerWeights])
      let scores = known.get(key)
      if (scores === undefined) {
        const there = await score(setting.model, setting.cache, setting.window, policy)
        scores = [there, await there.to('cpu')]
        known.set(key, scores)
      }
      const [gpuRanked, cpuRanked] = [await select(scores[0], policy), await select(scores[1], policy, { device: cpu })]
      const straight = await selectFrom(setting.model, setting.cache, setting.window, policy)
      expect((await gpuRanked.to('cpu')).tokens, 'of given scores').toEqual(cpuRanked.tokens)
      expect([...straight.offsets], 'straight from the cache').toEqual([...cpuRanked.offsets])
      expect((await straight.to('cpu')).tokens, 'straight from the cache').toEqual(cpuRanked.tokens)
      const { entries, kept, protectedEntries, nonFinite } = cpuRanked.report
      expect(straight.report).toMatchObject({ entries, kept, protectedEntries, nonFinite })
      reports.push(straight.report.path)
      for (const selection of [gpuRanked, straight]) selection.dispose()
    })
  }
  for (const [there] of known.values()) there.dispose()
  expect(await setting.mirror.changed()).toEqual([])
  return reports
}

async function done({ mirror, model }: Setting): Promise<void> {
  model.dispose()
  await mirror.dispose()
}

const peaked = makeLarge(1, 6)
const diffuse = makeLarge(2, 0.2)

for (const [kernels, on] of paths) {
  onGpu(`a selection straight from a cache, ${kernels} kernels`, () => {
    it('equals the exhaustive one, on peaked and on diffuse attention', async () => {
      for (const statistic of ['joint', 'bound'] as const) {
        for (const [{ problem, shape }, valueNorms] of [
          [peaked, true],
          [peaked, false],
          [diffuse, false],
        ] as const) {
          const setting = await setUp(on, problem, shape, { kind: 'NHD', pageSize: 16 }, valueNorms)
          const variants = valueNorms ? VARIANTS : VARIANTS.slice(0, 6)
          const reported = await expectSame(
            setting,
            variants.map((variant) => laprox({ score: { statistic }, ...variant })),
          )
          if (problem === peaked.problem) expect(reported[0]).toBe('pruned')
          await done(setting)
        }
      }
    })

    it('equals the exhaustive one for presets', async () => {
      const { problem, shape } = makeLarge(3, 5)
      const setting = await setUp(on, problem, shape, { kind: 'HND', pageSize: 64 }, false)
      const known = ['laprox', 'laproxBound', 'snapkv', 'pyramidkv', 'adakv', 'vatp', 'kvCompress', 'tova', 'streaming', 'knorm', 'random'] as const
      await expectSame(
        setting,
        known.map((name) => policies[name]({ keep: 0.05, window: 32, recent: 16 })),
      )
      await done(setting)
    })

    // Bounds are tightened in calls of some millions of entries alone, and twice as many are sampled before a threshold is proved: layers share their
    // memory here.
    it.each([40, 80])('equals the exhaustive one where bounds are tightened, of %d layers', async (layers) => {
      const [queryHeads, kvHeads, headDim, tokens, rows] = [4, 2, 64, 53_000, 32]
      const random = new Random(11)
      // Of either sign, from 1/8 to 1, times 2 ** exponent.
      const spread = (dims: number[], exponent = 0): Promise<Tensor<'bfloat16'>> => {
        const bits = new Uint16Array(dims.reduce((a, b) => a * b))
        for (let i = 0; i < bits.length; i++) {
          const drawn = Math.floor(random.next() * 2 ** 32)
          bits[i] = (drawn & 0x8000) | (0x3e00 + ((drawn >>> 16) % 0x180) + exponent * 0x80)
        }
        return new Tensor('bfloat16', bits, dims).to(on)
      }
      const repeated = (tensor: Tensor): Tensor[] => Array<Tensor>(layers).fill(tensor)
      const projection = await spread([32, queryHeads * headDim])
      const model = AttentionModel.create(on, { layers, queryHeads, kvHeads, headDim, outputProjections: repeated(projection) })
      const keys = await spread([kvHeads, tokens, headDim])
      const values = await spread([kvHeads, tokens, headDim])
      const queries = await spread([queryHeads, rows, headDim], 4)
      // Tokens at positions that no query has reached: nobody sees the last ones of each head.
      const positions = await new Tensor(
        'int32',
        new Int32Array(kvHeads * tokens).map((_, i) => (i % tokens) + 700),
        [kvHeads, tokens],
      ).to(on)
      const whole = KvCache.from(on, { keys: repeated(keys), values: repeated(values) })
      const ahead = KvCache.from(on, { keys: repeated(keys), values: repeated(values), positions: repeated(positions), contextLengths: [tokens] })
      const window = { queries: repeated(queries) }
      for (const [cache, factors] of [
        [whole, (i: number) => 1 + i / layers],
        [ahead, (i: number) => 1 + i / layers],
        [ahead, (i: number) => (i === 0 ? 1 : 0)], // the threshold is 0
      ] as const) {
        const policy = laprox({ layerWeights: Array.from({ length: layers }, (_, i) => factors(i)) })
        const scores = await score(model, cache, window, policy)
        const ranked = await select(scores, policy)
        const straight = await selectFrom(model, cache, window, policy)
        expect([...straight.offsets]).toEqual([...ranked.offsets])
        const [pruned, exhaustive] = [(await straight.to('cpu')).tokens, (await ranked.to('cpu')).tokens]
        expect(pruned.findIndex((token, i) => token !== exhaustive[i])).toBe(-1)
        if (cache === whole) expect(straight.report.path).toBe('pruned')
        if (cache === whole && kernels === 'hopper') expect(straight.report.exactScores).toBeLessThan(straight.report.candidates)
        for (const used of [scores, ranked, straight]) used.dispose()
      }
      for (const used of [model, keys, values, queries, projection, positions]) used.dispose()
    })

    it('foresees what no sample does, and repairs an overflow', async () => {
      for (const size of [6, 40, 1000]) {
        const random = new Random(size)
        const outlying = changeSegments(peaked.problem, [PLACES[2]!, PLACES[5]!], ({ keys, length }) => {
          const changed = keys.slice()
          for (let outlier = 0; outlier < 3; outlier++) {
            const at = random.integer(70, length - 140)
            for (let i = 0; i < 64; i++) changed[at * 64 + i]! *= size
          }
          return { keys: changed }
        })
        const setting = await setUp(on, outlying, peaked.shape, { kind: 'contiguous' }, true)
        await expectSame(setting, [laprox(), laprox({ scope: 'layer' }), laprox({ pooling: { kind: 'none' }, scope: 'head' })])
        await done(setting)
      }
    })

    it('holds among ties: equal keys, equal values, zeros', async () => {
      for (const kind of ['keys', 'values', 'zeros', 'everything'] as const) {
        const tied = changeSegments(peaked.problem, PLACES, ({ keys, values }) => ({
          keys: kind === 'keys' || kind === 'everything' ? keys.map((_, at) => keys[at % 64]!) : keys,
          values:
            kind === 'values' || kind === 'everything'
              ? values.map((_, at) => values[at % 64]!)
              : kind === 'zeros'
                ? values.map((x, at) => (at % 256 < 128 ? 0 : x))
                : values,
        }))
        const setting = await setUp(on, tied, peaked.shape, { kind: 'NHD', pageSize: 128, packed: true }, false)
        await expectSame(setting, [
          laprox(),
          laprox({ pooling: { kind: 'none' } }),
          laprox({ scope: 'layer', floor: 0.2 }),
          laprox({ scope: 'head' }),
        ])
        await done(setting)
      }
    })

    it('holds with soft-cap, sliding windows, sink logits and a given log-sum-exp', async () => {
      for (const givenBase of [undefined, 'e', '2'] as const) {
        const fixed = { softCaps: [0, 30, 0], slidingWindows: [0, 400, 0], hasSinkLogits: [false, false, true], givenBase } as Partial<Shape>
        const { problem, shape } = makeLarge(7, 6, fixed)
        const setting = await setUp(on, problem, shape, { kind: 'HND', pageSize: 8 }, givenBase !== 'e')
        await expectSame(setting, [laprox(), laprox({ pooling: { kind: 'none' }, scope: 'layer' })])
        await done(setting)
      }
    })

    it('holds for heads of their own lengths in a thinned cache, and for every head dimension and group', async () => {
      for (const [seed, headDim] of [8, 40, 96, 128, 256].entries()) {
        const random = new Random(seed)
        const own = seed % 2 === 1
        const lengths = own ? ownLengths(random, 2, 2, 2, 900) : Array<number>(8).fill(600)
        const shape = drawShape(random, {
          layers: 2,
          sequences: 2,
          kvHeads: 2,
          groupSize: [1, 2, 3, 7, 16][seed]!,
          headDim,
          modelDim: 32,
          rows: random.pick([16, 32, 64]),
          type: random.pick(['float16', 'bfloat16', 'float32']),
          spread: 6,
          coherence: 0.7,
          lengths,
          positions: own,
          slidingWindows: [],
        })
        const layout = own ? OWN_LENGTH_LAYOUTS[seed % 4]! : random.pick(SHARED_LENGTH_LAYOUTS)
        const setting = await setUp(on, makeProblem(random, shape), shape, layout, seed % 2 === 0)
        await expectSame(setting, [laprox({ recent: 4, window: shape.rows }), laprox({ recent: 4, window: shape.rows, pooling: { kind: 'none' } })])
        await done(setting)
      }
    })

    it('refuses and keeps scores that are not finite', async () => {
      const { problem, shape } = makeLarge(8, 6)
      problem.layers[1]!.segments[0]!.values[777 * 64 + 3] = Number.POSITIVE_INFINITY
      problem.layers[2]!.segments[1]!.values[600 * 64] = Number.NaN
      const setting = await setUp(on, problem, shape, { kind: 'contiguous' }, false)
      const { model, cache, window } = setting
      await expect(selectFrom(model, cache, window, laprox())).rejects.toMatchObject({
        code: 'NON_FINITE',
        message: expect.stringContaining("nonFinite: 'keep'"),
      })
      await expect(evict(model, cache, window, laprox())).rejects.toMatchObject({ code: 'NON_FINITE' })
      await expectSame(setting, [laprox({ nonFinite: 'keep' })])
      await done(setting)
    })

    it('is the same bits in 20 runs, evicted or exhaustive, and on 4 streams at a time', async () => {
      const { problem, shape } = peaked
      const setting = await setUp(on, problem, shape, { kind: 'NHD', pageSize: 16 }, false)
      const { model, cache, window } = setting
      const run = async (options: object): Promise<unknown> => {
        const { cache: kept, selection, report } = await evict(model, cache, window, laprox(), options)
        const tokens = [...(await selection.to('cpu')).tokens]
        const rows = readRows(await toHost(kept), 1, 0, 1)
        kept.dispose()
        selection.dispose()
        return { tokens, rows, kept: report.kept, after: report.bytesAfter }
      }
      const first = await run({})
      for (let i = 0; i < 20; i++) expect(await run({ exhaustive: i % 5 === 4 })).toEqual(first)
      const streams = [undefined, 'legacy', 'perThread', undefined] as const
      const all = await Promise.all(Array.from({ length: 12 }, (_, i) => run({ stream: streams[i % 4] })))
      for (const each of all) expect(each).toEqual(first)
      // Other devices on the same GPU have streams of their own.
      const more = await Promise.all(Array.from({ length: 3 }, () => Device.open('cuda', { kernels })))
      const others = await Promise.all(more.map((other) => setUp(other, problem, shape, { kind: 'NHD', pageSize: 16 }, false)))
      const runs = await Promise.all(others.flatMap((other) => [0, 1, 2].map(() => selectFrom(other.model, other.cache, other.window, laprox()))))
      for (const selection of runs) expect([...(await selection.to('cpu')).tokens]).toEqual((first as { tokens: number[] }).tokens)
      for (const other of others) await done(other)
      for (const other of more) other.dispose()
      await done(setting)
    })

    it('makes use of norms that the cache computes, and moves them along', async () => {
      const { problem, shape } = peaked
      const setting = await setUp(on, problem, shape, { kind: 'HND', pageSize: 32 }, false)
      const { model, cache, window } = setting
      const before = await selectFrom(model, cache, window, laprox())
      expect(cache.hasValueNorms).toBe(false)
      await cache.computeValueNorms()
      const host = await toHost(cache)
      const norms = host.valueNorms(1)
      const [pages, heads, size] = norms.dims as [number, number, number]
      const table = host.pageTable(1)
      for (const [segment, token] of [
        [0, 0],
        [1, 777],
        [2, 500],
      ] as const) {
        const [sequence, head] = [Math.floor(segment / 2), segment % 2]
        const page = table.data[sequence * table.dims[1]! + Math.floor(token / size)]!
        expect(page).toBeLessThan(pages)
        const value = problem.layers[1]!.segments[segment]!.values.subarray(token * 64, token * 64 + 64)
        expect(norms.data[norms.offset + (page * heads + head) * size + (token % size)]! / Math.hypot(...value)).toBeCloseTo(1, 6)
      }
      const after = await selectFrom(model, cache, window, laprox())
      expect((await after.to('cpu')).tokens).toEqual((await before.to('cpu')).tokens)
      const { cache: kept } = await evict(model, cache, window, laprox())
      expect(kept.hasValueNorms).toBe(true)
      const hostKept = await toHost(kept)
      const rows = readRows(hostKept, 0, 0, 0)
      for (const [i, row] of rows.values.entries()) {
        const norm = Math.hypot(...row.map((bits) => new Float32Array(Uint32Array.of(bits << 16).buffer)[0]!))
        expect(hostKept.valueNorms(0).data[hostKept.valueNorms(0).offset + i]! / norm).toBeCloseTo(1, 6)
      }
      await done(setting)
    })
  })
}
