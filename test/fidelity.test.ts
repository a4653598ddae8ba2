import { afterAll, describe, expect, it } from 'vitest'
import {
  AttentionModel,
  compact,
  Device,
  type Fidelity,
  fidelity,
  KvCache,
  type LaproxErrorCode,
  policies,
  Selection,
  selectFrom,
  Tensor,
  type Window,
} from '../lib/index.js'
import { changes, continued, fidelity as oracle, relativeError, type Squares } from './oracle/fidelity.js'
import type { Problem } from './oracle/problem.js'
import { buildCache, buildModel, buildWindow, INSTRUCTION_SETS, type Layout, OWN_LENGTH_LAYOUTS, SHARED_LENGTH_LAYOUTS } from './support/build.js'
import { roundTo } from './support/half.js'
import { drawShape, GROUP_SIZES, makeProblem, ownLengths, type Shape, sharedLengths } from './support/problem.js'
import { Random } from './support/random.js'
import { problemOf } from './support/read.js'

const device = await Device.open('cpu', { threads: 2 })
afterAll(() => device.dispose())

/** Of the errors that the float64 oracle finds: some float32 roundings, of which the norms of some dozen rows even out most. */
const TOLERANCE = 1e-6

interface Setting {
  readonly shape: Shape
  readonly problem: Problem
  /** The problem of the later queries. */
  readonly next: Problem
  /** Kept tokens, one array a segment. */
  readonly kept: readonly (readonly number[])[]
}

function draw(seed: number, fixed: Partial<Shape> = {}, rows?: number): Setting {
  const random = new Random(seed)
  const shape = drawShape(random, fixed)
  const problem = makeProblem(random, shape)
  // Some heads keep nothing, some everything.
  const kept = shape.lengths.map((n) => random.subset(n, random.pick([0, n, ...Array.from({ length: 6 }, () => random.integer(0, n))])))
  return { shape, problem, next: followed(problem, shape, rows ?? random.pick([1, 2, 5, 33]), random), kept }
}

function followed(problem: Problem, shape: Shape, rows: number, random: Random): Problem {
  const count = problem.queryHeads * rows * problem.headDim
  const queries = problem.layers.map(() =>
    Array.from({ length: problem.sequences }, () => Float64Array.from({ length: count }, () => roundTo(shape.type, random.normal()))),
  )
  return continued(problem, rows, queries)
}

function selectionOf({ layers, sequences, kvHeads }: Shape, kept: Setting['kept']): Selection {
  return Selection.from({ layers, sequences, kvHeads, counts: kept.map(({ length }) => length), tokens: Int32Array.from(kept.flat()) })
}

async function measure({ shape, problem, next, kept }: Setting, layout: Layout, random: Random, on = device): Promise<Fidelity> {
  using model = buildModel(on, problem, shape.type, random.chance(0.3))
  using cache = buildCache(on, problem, shape.type, layout, random, { positions: shape.positions })
  const window = buildWindow(problem, shape.type, shape.givenBase)
  return await fidelity(model, cache, selectionOf(shape, kept), window, { later: buildWindow(next, shape.type) })
}

function expectErrors(actual: Fidelity, which: 'window' | 'later', exact: readonly Squares[]): void {
  expect(actual.layers).toHaveLength(exact.length)
  for (const [given, squares] of [[actual, exact] as const, ...exact.map((layer, l) => [actual.layers[l]!, [layer]] as const)]) {
    const expected = relativeError(squares)
    expect(Math.abs(given[which]! - expected), `${given[which]} is not ${expected}`).toBeLessThanOrEqual(TOLERANCE * expected)
  }
}

async function check(seed: number, fixed: Partial<Shape> = {}, layout?: Layout, on = device): Promise<void> {
  const setting = draw(seed, fixed)
  const random = new Random(seed)
  const actual = await measure(setting, layout ?? random.pick(SHARED_LENGTH_LAYOUTS), random, on)
  expectErrors(actual, 'window', oracle(setting.problem, setting.kept))
  expectErrors(actual, 'later', oracle(setting.next, setting.kept))
}

/** One layer and head of d = 8, a token for each key and value, a query that asks for their first feature; W_O is the identity. */
async function tiny(keys: readonly number[], values: readonly number[], kept: readonly number[], sinkLogits?: Float32Array): Promise<number> {
  const plane = (numbers: readonly number[]): Tensor => {
    const data = new Float32Array(numbers.length * 8)
    for (const [i, x] of numbers.entries()) data[8 * i] = x
    return new Tensor('float32', data, [1, numbers.length, 8])
  }
  const identity = Float32Array.from({ length: 64 }, (_, i) => (i % 9 === 0 ? 1 : 0))
  const shape = { layers: 1, queryHeads: 1, kvHeads: 1, headDim: 8, outputProjections: [new Tensor('float32', identity, [8, 8])] }
  using model = AttentionModel.create(device, { ...shape, scale: 1, ...(sinkLogits === undefined ? {} : { sinkLogits }) })
  const cache = KvCache.from(device, { keys: [plane(keys)], values: [plane(values)] })
  const selection = Selection.from({ layers: 1, kvHeads: 1, counts: [kept.length], tokens: Int32Array.from(kept) })
  return (await fidelity(model, cache, selection, { queries: [plane([1])] })).window
}

describe('fidelity', () => {
  it.each([...Array(20).keys()])('follows its definition on random geometry (seed %i)', (seed) => check(seed))

  it.each(GROUP_SIZES)('follows its definition for groups of %i query heads', (groupSize) =>
    check(100 + groupSize, { groupSize, kvHeads: 2, headDim: 16 }),
  )

  it.each([8, 24, 72, 128, 200, 256])('follows its definition for heads of dimension %i', (headDim) =>
    check(200 + headDim, { headDim, groupSize: 3, kvHeads: 2, layers: 1, sequences: 1, modelDim: 40, lengths: [19, 19] }),
  )

  it.each([1, 2, 31, 32, 33, 64, 127, 128])('follows its definition for windows of %i rows', async (rows) => {
    const fixed: Partial<Shape> = { rows, groupSize: 2, kvHeads: 2, headDim: 8, layers: 2, sequences: 2 }
    const setting = draw(300 + rows, fixed, rows)
    const actual = await measure(setting, { kind: 'contiguous' }, new Random(rows))
    expectErrors(actual, 'window', oracle(setting.problem, setting.kept))
    expectErrors(actual, 'later', oracle(setting.next, setting.kept))
  })

  it('follows its definition where the model is narrower than a head, and wider than all', async () => {
    for (const modelDim of [1, 7, 130]) await check(modelDim, { modelDim, headDim: 16, groupSize: 4, kvHeads: 2, layers: 1 })
  })

  it('follows its definition for segments longer than a tile, a block and a page', async () => {
    const lengths = [1500, 1500, 481, 481, 0, 0, 480, 480]
    for (const seed of [1, 2, 3]) await check(seed, { layers: 2, sequences: 2, kvHeads: 2, groupSize: 2, headDim: 8, rows: 8, lengths })
  })

  it('follows its definition for a cache that was thinned before, heads of different lengths', async () => {
    for (const [seed, layout] of OWN_LENGTH_LAYOUTS.entries()) {
      const lengths = ownLengths(new Random(seed), 2, 2, 3, 70)
      await check(400 + seed, { positions: true, layers: 2, sequences: 2, kvHeads: 3, groupSize: 2, lengths, slidingWindows: [0, 25] }, layout)
    }
  })

  it('follows its definition with soft-cap, sliding window, sink logits and a given log-sum-exp all at once', async () => {
    for (const givenBase of ['e', '2'] as const) {
      await check(31, {
        layers: 2,
        softCaps: [5, 30],
        slidingWindows: [9, 40],
        hasSinkLogits: [true, true],
        givenBase,
        rows: 16,
        lengths: sharedLengths(new Random(2), 2, 2, 2, 60),
        sequences: 2,
        kvHeads: 2,
        groupSize: 3,
        headDim: 16,
      })
    }
  })

  it.each(INSTRUCTION_SETS)('follows its definition with %s instructions', async (instructionSet) => {
    let on: Device
    try {
      on = await Device.open('cpu', { threads: 2, instructionSet })
    } catch (error) {
      expect(error).toMatchObject({ code: 'UNSUPPORTED' })
      return
    }
    for (let seed = 500; seed < 504; seed++) await check(seed, {}, undefined, on)
    on.dispose()
  })

  it('is what a model sees that goes on with the compacted cache', async () => {
    const setting = draw(7, { layers: 2, sequences: 2, kvHeads: 2, positions: true, lengths: [40, 40, 9, 9, 33, 33, 20, 20] })
    const { shape, problem, next, kept } = setting
    const layout = { kind: 'NHD', pageSize: 16 } as const
    const cache = buildCache(device, problem, shape.type, layout, new Random(7), { positions: true })
    const result = await compact(cache, selectionOf(shape, kept))
    const actual = await measure(setting, layout, new Random(7))
    expectErrors(actual, 'window', changes(problem, problemOf(result, problem, shape.type)))
    expectErrors(actual, 'later', changes(next, problemOf(result, next, shape.type)))
  })

  it('is 0 where everything is kept, and 1 where nothing is', async () => {
    for (let seed = 600; seed < 603; seed++) {
      const setting = draw(seed, {
        hasSinkLogits: [seed % 2 === 0, true, false],
        lengths: [600, 600, 3, 3, 30, 30],
        layers: 3,
        sequences: 1,
        kvHeads: 2,
      })
      const all = setting.shape.lengths.map((n) => [...Array(n).keys()])
      const layers = (error: number) => Array(3).fill({ window: error, later: error })
      const unlimited = { ...setting, problem: withoutSlidingWindow(setting.problem), next: withoutSlidingWindow(setting.next) }
      expect(await measure({ ...setting, kept: all }, { kind: 'packed' }, new Random(seed))).toEqual({ window: 0, later: 0, layers: layers(0) })
      expect(await measure({ ...unlimited, kept: all.map(() => []) }, { kind: 'packed' }, new Random(seed))).toEqual({
        window: 1,
        later: 1,
        layers: layers(1),
      })
    }
  })

  it('keeps its digits where what is dropped is next to nothing', async () => {
    // The last token has a share of e^-x; its value is 2 more than all others.
    for (const x of [5, 20, 40, 60]) {
      const share = Math.exp(-x) / (2 + Math.exp(-x))
      expect((await tiny([0, 0, -x], [1, 1, 3], [0, 1])) / ((2 * share) / (1 + 2 * share))).toBeCloseTo(1, 5)
    }
    expect(await tiny([0, 0, -1], [1, 1, 1], [0, 1])).toBeLessThan(1e-7)
  })

  it('is of what is kept, however little attention that has had', async () => {
    for (const x of [30, 100, 1000]) {
      // The first token has all attention; of the others, two are kept.
      const left = (5 * Math.exp(-2) - 3) / (Math.exp(-2) + 1)
      expect(await tiny([0, -x - 2, -x, -x], [1, 5, -3, 7], [1, 2])).toBeCloseTo(1 - left, 3)
    }
    // With a sink that has a logit above theirs, nothing is what they get.
    expect(await tiny([0, -200], [1, 5], [1], Float32Array.of(-20))).toBeCloseTo(1, 6)
  })

  it('is 0 where there is no output and none comes, else infinite', async () => {
    expect(await tiny([0, 0], [0, 0], [1])).toBe(0)
    expect(await tiny([0, 0], [1, -1], [0])).toBe(Number.POSITIVE_INFINITY)
    expect(await tiny([], [], [])).toBe(0)
  })

  it('has the same bits on 1, 2 and 7 threads and in every layout', async () => {
    const fixed: Partial<Shape> = { layers: 2, sequences: 2, kvHeads: 2, groupSize: 3, headDim: 16, rows: 40, spread: 3 }
    const setting = draw(9, { ...fixed, slidingWindows: [0, 700], lengths: [1300, 1300, 2000, 2000, 100, 100, 481, 481] })
    const expected = await measure(setting, { kind: 'contiguous' }, new Random(1))
    for (const threads of [1, 2, 7]) {
      const on = await Device.open('cpu', { threads })
      for (const layout of [{ kind: 'contiguous' }, { kind: 'HND', pageSize: 16 }] as const) {
        expect(await measure(setting, layout, new Random(threads), on)).toEqual(expected)
      }
      on.dispose()
    }
  })

  it('looks at the last 128 rows of a longer window, and at no log-sum-exp', async () => {
    const { shape, problem, kept } = draw(10, { rows: 128, layers: 1, sequences: 1, type: 'float32', lengths: [150, 150], kvHeads: 2 })
    const model = buildModel(device, problem, shape.type)
    const cache = buildCache(device, problem, shape.type, { kind: 'contiguous' }, new Random(1))
    const queries = buildWindow(problem, shape.type).queries.map((tensor) => tensor.at(0) as Tensor<'float32'>)
    const longer = queries.map((tensor) => {
      const [heads, rows, d] = tensor.dims as [number, number, number]
      const more = new Tensor('float32', new Float32Array(heads * (rows + 9) * d).fill(Number.NaN), [heads, rows + 9, d])
      for (let h = 0; h < heads; h++) more.data.set(tensor.data.subarray(h * rows * d, (h + 1) * rows * d), (h * (rows + 9) + 9) * d)
      return more
    })
    const selection = selectionOf(shape, kept)
    const expected = await fidelity(model, cache, selection, { queries })
    expect(expected).not.toHaveProperty('later')
    expect(await fidelity(model, cache, selection, { queries: longer })).toEqual(expected)
    const logSumExp = queries.map(({ dims }) => new Tensor('float32', new Float32Array(dims[0]! * dims[1]!).fill(Number.NaN), dims.slice(0, 2)))
    expect(await fidelity(model, cache, selection, { queries, logSumExp })).toEqual(expected)
  })

  it('is better for what laprox keeps of a peaked cache than for as much by chance', async () => {
    const setting = draw(11, { layers: 3, sequences: 1, kvHeads: 2, groupSize: 2, spread: 5, coherence: 0.8, rows: 16, lengths: Array(6).fill(200) })
    const { shape, problem } = setting
    const model = buildModel(device, problem, shape.type)
    const cache = buildCache(device, problem, shape.type, { kind: 'contiguous' }, new Random(1))
    const window = buildWindow(problem, shape.type)
    const errorOf = async (policy: ReturnType<typeof policies.laprox>): Promise<number> =>
      (await fidelity(model, cache, await selectFrom(model, cache, window, policy), window)).window
    const options = { keep: 0.2, window: shape.rows, sinks: 0, recent: 0 }
    const [ours, chance] = [await errorOf(policies.laprox(options)), await errorOf(policies.random({ ...options, seed: 1 }))]
    expect(ours).toBeGreaterThan(0)
    expect(ours).toBeLessThan(chance / 2)
    expect(await errorOf(policies.laprox({ ...options, keep: 0.4 }))).toBeLessThan(ours)
  })
})

function withoutSlidingWindow(problem: Problem): Problem {
  return { ...problem, layers: problem.layers.map((layer) => ({ ...layer, slidingWindow: 0 })) }
}

const SHAPE = { layers: 2, queryHeads: 4, kvHeads: 2, headDim: 8 }
const floats = (...dims: number[]): Tensor<'float32'> => Tensor.zeros('float32', dims)
const two = <T>(make: () => T): [T, T] => [make(), make()]

describe('fidelity refuses', () => {
  const outputProjections = two(() => floats(16, 32))
  const model = AttentionModel.create(device, { ...SHAPE, outputProjections })
  const cache = KvCache.from(device, { keys: two(() => floats(2, 20, 8)), values: two(() => floats(2, 20, 8)) })
  const choose = (counts: number[], tokens: number[], layers = 2): Selection =>
    Selection.from({ layers, kvHeads: 2, counts, tokens: Int32Array.from(tokens) })
  const selection = choose([1, 2, 0, 1], [3, 0, 19, 7])
  const window: Window = { queries: two(() => floats(4, 4, 8)) }
  const later = (...dims: number[]) => ({ options: { later: { queries: two(() => floats(...dims)) } } })

  async function refuses(code: LaproxErrorCode, message: RegExp, given: object): Promise<void> {
    const all = { model, cache, selection, window, options: undefined, ...given }
    const error: unknown = await fidelity(all.model, all.cache, all.selection, all.window, all.options).catch((thrown: unknown) => thrown)
    expect(error).toMatchObject({ name: 'LaproxError', code })
    expect((error as Error).message).toMatch(message)
  }

  it.each<readonly [what: string, code: LaproxErrorCode, message: RegExp, given: object]>([
    ['a model that is none', 'INVALID_ARGUMENT', /^model is \{\}; expected an AttentionModel/, { model: {} }],
    ['a cache that is none', 'INVALID_ARGUMENT', /^cache is null; expected a KvCache/, { cache: null }],
    ['a selection that is none', 'INVALID_ARGUMENT', /^selection is Int32Array\(2\); expected a Selection/, { selection: new Int32Array(2) }],
    [
      'a selection of another shape',
      'INVALID_ARGUMENT',
      /^selection: layers is 1; expected that of the cache, 2/,
      { selection: choose([1, 0], [4], 1) },
    ],
    [
      'tokens that do not exist',
      'OUT_OF_BOUNDS',
      /selected token 20 of \(layer 0, sequence 0, head 1\): expected ascending tokens below 20/,
      { selection: choose([0, 1, 0, 0], [20]) },
    ],
    ['tokens out of order', 'OUT_OF_BOUNDS', /selected token 3 of \(layer 1/, { selection: choose([0, 0, 2, 0], [4, 3]) }],
    ['no window', 'INVALID_ARGUMENT', /^window is null; expected an object with queries/, { window: null }],
    ['a window without queries', 'INVALID_ARGUMENT', /^queries is missing; expected an array with one tensor per layer/, { window: {} }],
    ['queries of no rows', 'INVALID_ARGUMENT', /^queries have 0 rows; expected the last/, { window: { queries: two(() => floats(4, 0, 8)) } }],
    [
      'queries of other heads',
      'INVALID_ARGUMENT',
      /^queries\[0\] is float32 \[2, 4, 8\]; expected \[H, m, d\] = \[4, 4, 8\]/,
      { window: { queries: two(() => floats(2, 4, 8)) } },
    ],
    ['options that are none', 'INVALID_ARGUMENT', /^options is 3; expected an object/, { options: 3 }],
    ['later queries that are an array', 'INVALID_ARGUMENT', /^options.later is \[\]; expected an object with queries/, { options: { later: [] } }],
    ['later queries that are missing', 'INVALID_ARGUMENT', /^options.later.queries is missing/, { options: { later: {} } }],
    [
      'later queries of other layers',
      'INVALID_ARGUMENT',
      /^options.later.queries has 1 tensors; expected one per layer, 2/,
      { options: { later: { queries: [floats(4, 3, 8)] } } },
    ],
    [
      'later queries of other heads',
      'INVALID_ARGUMENT',
      /^options.later.queries\[0\] is float32 \[3, 3, 8\]; expected \[H, m, d\] = \[4, 3, 8\]/,
      later(3, 3, 8),
    ],
    ['later queries of another dimension', 'INVALID_ARGUMENT', /^options.later.queries\[0\] is float32 \[4, 3, 16\]/, later(4, 3, 16)],
    ['later queries of other sequences', 'INVALID_ARGUMENT', /^options.later.queries\[0\] .* = \[1, 4, 3, 8\]/, later(2, 4, 3, 8)],
    ['more than 128 later queries', 'INVALID_ARGUMENT', /^options.later.queries have 129 rows; expected the next 1 to 128/, later(4, 129, 8)],
    ['no later queries', 'INVALID_ARGUMENT', /^options.later.queries have 0 rows/, later(4, 0, 8)],
    [
      'later queries of integers',
      'INVALID_ARGUMENT',
      /^options.later.queries\[0\] is int32/,
      {
        options: { later: { queries: two(() => Tensor.zeros('int32', [4, 3, 8])) } },
      },
    ],
    ['a signal that is none', 'INVALID_ARGUMENT', /^options.signal is/, { options: { signal: 'stop' } }],
  ])('%s', (_, code, message, given) => refuses(code, message, given))

  it('a cache of another shape or device than the model', async () => {
    const planes = { keys: [floats(2, 20, 8)], values: [floats(2, 20, 8)] }
    await refuses('INVALID_ARGUMENT', /^cache: layers is 1; expected that of the model, 2/, { cache: KvCache.from(device, planes) })
    const other = await Device.open('cpu', { threads: 1 })
    const elsewhere = KvCache.from(other, { keys: two(() => floats(2, 20, 8)), values: two(() => floats(2, 20, 8)) })
    await refuses('DEVICE_MISMATCH', /another device than the model/, { cache: elsewhere })
    other.dispose()
  })

  it('a model without output projections', async () => {
    using bare = AttentionModel.create(device, SHAPE)
    await refuses('UNSUPPORTED', /^fidelity needs the output projection, and layer 0 of the model has none/, { model: bare })
  })

  it('outputs that are not finite, and names the layer', async () => {
    for (const [at, x] of [
      ['keys', Number.NaN],
      ['keys', Number.POSITIVE_INFINITY],
      ['values', Number.NaN],
      ['values', Number.NEGATIVE_INFINITY],
    ] as const) {
      const planes = { keys: two(() => floats(2, 20, 8)), values: two(() => floats(2, 20, 8)) }
      planes[at][1].data.fill(x, 5 * 8, 6 * 8)
      const weights = two(() => floats(16, 32))
      for (const { data } of weights) data.fill(1)
      using full = AttentionModel.create(device, { ...SHAPE, outputProjections: weights })
      const queries = two(() => floats(4, 4, 8))
      for (const { data } of queries) data.fill(1)
      await refuses('NON_FINITE', /^the output of layer 1 is not finite/, { model: full, cache: KvCache.from(device, planes), window: { queries } })
    }
  })

  it('what has been disposed of or transferred', async () => {
    const own = { keys: two(() => floats(2, 20, 8)), values: two(() => floats(2, 20, 8)) }
    const gone = KvCache.from(device, own)
    gone.dispose()
    await refuses('DISPOSED', /^the cache/, { cache: gone })
    const weights = two(() => floats(16, 32))
    const former = AttentionModel.create(device, { ...SHAPE, outputProjections: weights })
    await former.ready
    structuredClone(weights[1].data, { transfer: [weights[1].data.buffer as ArrayBuffer] })
    await refuses('DETACHED', /./, { model: former })
    former.dispose()
    await refuses('DISPOSED', /^the model/, { model: former })
    const tokens = Int32Array.of(3)
    const taken = Selection.from({ layers: 2, kvHeads: 2, counts: [1, 0, 0, 0], tokens })
    structuredClone(tokens, { transfer: [tokens.buffer] })
    await refuses('DETACHED', /^the buffer of the selection/, { selection: taken })
  })
})

describe('a running fidelity', () => {
  const tokens = process.env.LD_PRELOAD === undefined ? 60_000 : 4000 // sanitizers are preloaded

  function setUp(on = device) {
    const random = new Random(1)
    const noise = (...dims: number[]): Tensor<'float32'> => {
      const tensor = floats(...dims)
      for (let i = 0; i < tensor.size; i++) tensor.data[i] = random.next() - 0.5
      return tensor
    }
    const model = AttentionModel.create(on, { layers: 1, queryHeads: 8, kvHeads: 2, headDim: 32, outputProjections: [noise(64, 256)] })
    const cache = KvCache.from(on, { keys: [noise(2, tokens, 32)], values: [noise(2, tokens, 32)] })
    const selection = Selection.from({ layers: 1, kvHeads: 2, counts: [2, 1], tokens: Int32Array.of(0, 7, 5) })
    return { model, cache, selection, window: { queries: [noise(8, 64, 32)] }, later: { queries: [noise(8, 16, 32)] } }
  }

  it('is ended by its signal', async () => {
    const { model, cache, selection, window, later } = setUp()
    const start = performance.now()
    await fidelity(model, cache, selection, window, { later })
    const whole = performance.now() - start
    const reason = new Error('changed my mind')
    const aborted = { name: 'LaproxError', code: 'ABORTED', cause: reason }
    await expect(fidelity(model, cache, selection, window, { signal: AbortSignal.abort(reason) })).rejects.toMatchObject(aborted)
    const controller = new AbortController()
    const running = fidelity(model, cache, selection, window, { later, signal: controller.signal })
    await new Promise((resolve) => setTimeout(resolve, whole / 10))
    const end = performance.now()
    controller.abort(reason)
    await expect(running).rejects.toMatchObject(aborted)
    expect(performance.now() - end).toBeLessThan(whole / 2)
  })

  it('tells how far it is', async () => {
    const { model, cache, selection, window, later } = setUp()
    const seen: number[] = []
    await fidelity(model, cache, selection, window, { later, progress: (done) => seen.push(done) })
    expect(seen).toEqual([...seen].sort((a, b) => a - b))
    expect(seen.length).toBeGreaterThan(1)
    expect(seen.at(-1)).toBe(1)
  })

  it('goes on where everything that it was given is disposed of', async () => {
    const own = await Device.open('cpu', { threads: 2 })
    const { model, cache, selection, window, later } = setUp(own)
    const expected = await fidelity(model, cache, selection, window, { later })
    const running = fidelity(model, cache, selection, window, { later })
    for (const object of [own, model, cache, selection]) object.dispose()
    expect(await running).toEqual(expected)
  })
})
