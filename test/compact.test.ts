import { afterAll, describe, expect, it } from 'vitest'
import { compact, Device, KvCache, type Policy, policies, Scores, type Selection, select, Tensor } from '../lib/index.js'
import { maskedOutputs, outputs } from './oracle/compact.js'
import type { Problem } from './oracle/problem.js'
import { buildCache, type Layout, OWN_LENGTH_LAYOUTS, SHARED_LENGTH_LAYOUTS, tensor } from './support/build.js'
import { storage, write } from './support/half.js'
import { drawShape, makeProblem, ownLengths, type Shape, sharedLengths } from './support/problem.js'
import { Random } from './support/random.js'
import { problemOf, readRows } from './support/read.js'

const device = await Device.open('cpu', { threads: 2 })
afterAll(() => device.dispose())

const ALL_LAYOUTS = [...SHARED_LENGTH_LAYOUTS, ...OWN_LENGTH_LAYOUTS]
const name = (layout: Layout): string => Object.values(layout).join(' ')
const NAMED = ALL_LAYOUTS.map((layout) => [name(layout), layout] as const)

interface Setting {
  readonly problem: Problem
  readonly shape: Shape
  readonly layout: Layout
  readonly cache: KvCache
  readonly selection: Selection
  /** Kept tokens, one array a segment. */
  readonly kept: number[][]
}

const KEEP_SOME: Partial<Policy> = { budget: { ratio: 0.4 }, scope: 'model' }

/** Any cache in a layout, and a random choice of what to keep of it. */
async function setUp(seed: number, layout: Layout, positions: boolean, rule: Partial<Policy> = KEEP_SOME): Promise<Setting> {
  const random = new Random(seed)
  const own = layout.kind === 'ragged' || layout.kind === 'head-pages'
  const shape = drawShape(random, {
    layers: 3,
    sequences: 2,
    kvHeads: 3,
    groupSize: 2,
    headDim: random.pick([8, 16, 24]),
    rows: 2,
    lengths: (own ? ownLengths : sharedLengths)(random, 3, 2, 3, 70),
    positions,
    slidingWindows: [0, 20, 0],
    hasSinkLogits: [],
    givenBase: undefined,
  } as unknown as Partial<Shape>)
  const problem = makeProblem(random, shape)
  const cache = buildCache(device, problem, shape.type, layout, random, { positions, valueNorms: true })
  const lengths = Int32Array.from(shape.lengths)
  const scores = Scores.from({
    layers: 3,
    sequences: 2,
    kvHeads: 3,
    lengths,
    data: Float32Array.from({ length: cache.entries }, () => random.next()),
    bytesPerEntry: 1,
  })
  const policy = { ...policies.laprox({ keep: 1, sinks: 0, recent: 0 }), pooling: { kind: 'none' }, ...rule } as const
  const selection = await select(scores, policy, { device })
  const kept = Array.from(lengths, (_, x) => [...selection.kept(Math.floor(x / 6), Math.floor(x / 3) % 2, x % 3)])
  return { problem, shape, layout, cache, selection, kept }
}

/** Every row of the result is the kept row of the source, bit for bit, and carries its original position. */
function expectKept(result: KvCache, { problem, kept }: Setting, source: ReturnType<typeof rowsOf>): void {
  for (const [x, tokens] of kept.entries()) {
    const [layer, sequence, head] = [Math.floor(x / 6), Math.floor(x / 3) % 2, x % 3] as const
    expect(result.lengths(layer)[x % 6]).toBe(tokens.length)
    const rows = readRows(result, layer, sequence, head)
    expect(rows.keys).toEqual(tokens.map((t) => source[x]!.keys[t]))
    expect(rows.values).toEqual(tokens.map((t) => source[x]!.values[t]))
    const { positions } = problem.layers[layer]!.segments[x % 6]!
    expect(rows.positions).toEqual(tokens.map((t) => positions[t]))
  }
}

const rowsOf = (cache: KvCache) => Array.from({ length: 18 }, (_, x) => readRows(cache, Math.floor(x / 6), Math.floor(x / 3) % 2, x % 3))

/** Attention over the compacted cache equals attention over the full one with the dropped entries masked. */
function expectAttention(result: KvCache, { problem, shape, kept }: Setting): void {
  const actual = outputs(problemOf(result, problem, shape.type))
  for (const [at, expected] of maskedOutputs(problem, kept).entries()) {
    for (const [i, value] of expected.entries()) expect(Math.abs(actual[at]![i]! - value)).toBeLessThanOrEqual(1e-9)
  }
}

/** Pools of pages of one head each, one a layer or one for all; everything NaN. */
function makePages({ shape }: Setting, pageSize: number, pages: number, pools: 1 | 3) {
  const make = (): Tensor => {
    const data = storage(shape.type, pages * pageSize * shape.headDim)
    for (let i = 0; i < data.length; i++) write(shape.type, data, i, Number.NaN)
    return tensor(shape.type, data, [pages, pageSize, shape.headDim])
  }
  const perLayer = <T>(one: () => T): T[] => (pools === 3 ? [one(), one(), one()] : Array<T>(3).fill(one()))
  return {
    keys: perLayer(make),
    values: perLayer(make),
    positions: perLayer(() => new Tensor('int32', new Int32Array(pages * pageSize).fill(-1), [pages, pageSize])),
    valueNorms: perLayer(() => new Tensor('float32', new Float32Array(pages * pageSize).fill(-1), [pages, pageSize])),
  }
}

const pagesFor = (kept: readonly number[][], pageSize: number): number[] => kept.map(({ length }) => Math.ceil(length / pageSize))

it.each([
  ['whole cache lines', 64, 0],
  ['whole cache lines, begun anywhere', 64, 8],
  ['parts of cache lines', 40, 0],
  ['parts of them, begun between vectors', 40, 2],
])('more rows than a processor caches are moved past its caches: %s', async (_, headDim, shift) => {
  const [tokens, pageSize] = [9000, 16]
  using baseline = await Device.open('cpu', { threads: 2, instructionSet: 'baseline' })
  const random = new Random(headDim + shift)
  // Tensors that begin `shift` numbers behind a cache line.
  const at = (dims: number[]): Tensor => {
    const size = dims.reduce((a, b) => a * b)
    return new Tensor('float32', Tensor.zeros('float32', [2 ** 20 + size]).data.subarray(shift, shift + size), dims)
  }
  const [keys, values] = [at([2, tokens, headDim]), at([2, tokens, headDim])]
  for (const { data } of [keys, values]) for (let i = 0; i < data.length; i++) data[i] = random.next()
  const of = (device: Device) => KvCache.from(device, { keys: [keys], values: [values] })
  const scores = Scores.from({
    layers: 1,
    kvHeads: 2,
    lengths: [tokens, tokens],
    data: Float32Array.from({ length: 2 * tokens }, () => random.next()),
  })
  const selection = await select(scores, { ...policies.laprox({ keep: 0.9 }), pooling: { kind: 'none' } }, { device })
  const count = selection.counts.reduce((sum, rows) => sum + Math.ceil(rows / pageSize), 0)
  const dims = [count, pageSize, headDim]
  const pages = () => ({ keys: [at(dims)], values: [at(dims)], freePages: Int32Array.from(random.shuffled(Array(count).keys())) })
  const results = [
    await compact(of(device), selection),
    await compact(of(device), selection, { target: 'pages', ...pages() }),
    await compact(of(baseline), selection, { target: 'pages', ...pages() }),
  ]
  for (const head of [0, 1]) {
    const kept = [...selection.kept(0, 0, head)]
    const rows = (data: ArrayLike<number>) => kept.map((t) => Array.from({ length: headDim }, (__, i) => data[(head * tokens + t) * headDim + i]!))
    for (const result of results) {
      const moved = readRows(result, 0, 0, head)
      expect(moved.keys).toEqual(rows(keys.data as Float32Array))
      expect(moved.values).toEqual(rows(values.data as Float32Array))
      expect(moved.positions).toEqual(kept)
    }
  }
})

describe.each(NAMED)('a %s cache', (_, layout) => {
  it('is compacted to ragged rows, and leaves itself as it was', async () => {
    for (const positions of [false, true]) {
      const setting = await setUp(1, layout, positions)
      const source = rowsOf(setting.cache)
      const result = await compact(setting.cache, setting.selection)
      expect(result.kind).toBe('ragged')
      expect(result.entries).toBe(setting.selection.entries)
      expectKept(result, setting, source)
      expectAttention(result, setting)
      expect(rowsOf(setting.cache)).toEqual(source)
      for (let layer = 0; layer < 3; layer++) {
        const counts = setting.kept.slice(6 * layer, 6 * layer + 6).map(({ length }) => length)
        expect([...result.lengths(layer)]).toEqual(counts)
        expect([...result.cumulativeLengths(layer)]).toEqual([0, ...counts.map((__, i) => counts.slice(0, i + 1).reduce((sum, n) => sum + n, 0))])
      }
    }
  })

  it('is compacted to pages from shuffled free lists', async () => {
    for (const [seed, pageSize] of [1, 16, 64].entries()) {
      for (const pools of [1, 3] as const) {
        const setting = await setUp(10 + seed, layout, pools === 1)
        const source = rowsOf(setting.cache)
        const needed = pagesFor(setting.kept, pageSize)
        const total = needed.reduce((sum, n) => sum + n, 0)
        const pages = total + 5
        const target = makePages(setting, pageSize, pages, pools)
        const random = new Random(seed)
        const lists = Array.from({ length: pools }, () => Int32Array.from(random.shuffled(Array(pages).keys())))
        const result = await compact(setting.cache, setting.selection, {
          target: 'pages',
          ...target,
          freePages: pools === 1 ? lists[0]! : lists,
        })
        expectKept(result, setting, source)
        expectAttention(result, setting)
        // Pages are taken from the front of the lists, in the order of segments.
        const perLayer = [0, 1, 2].map((l) => needed.slice(6 * l, 6 * l + 6).reduce((sum, n) => sum + n, 0))
        expect([...result.pagesUsed!]).toEqual(pools === 1 ? [total] : perLayer)
        const taken = [0, 0, 0]
        for (const [x, count] of needed.entries()) {
          const layer = Math.floor(x / 6)
          const table = result.pageTable(layer)
          const width = table.dims[2]!
          const list = pools === 1 ? 0 : layer
          const ids = [...table.data.subarray((x % 6) * width, (x % 6) * width + count)]
          expect(ids).toEqual([...lists[list]!.subarray(taken[list]!, taken[list]! + count)])
          // The norms of the value rows move along.
          const { values } = setting.problem.layers[layer]!.segments[x % 6]!
          const { headDim } = setting.shape
          for (const [row, token] of setting.kept[x]!.entries()) {
            const norm = Math.fround(Math.hypot(...values.subarray(token * headDim, (token + 1) * headDim)))
            expect(target.valueNorms[layer]!.data[ids[Math.floor(row / pageSize)]! * pageSize + (row % pageSize)]).toBe(norm)
          }
          taken[list]! += count
        }
        // Pages that were not taken hold what they held.
        for (const [list, ids] of lists.entries()) {
          for (const id of ids.subarray(taken[list])) {
            const positions = target.positions[list]!.data.subarray(id * pageSize, (id + 1) * pageSize)
            expect([...positions]).toEqual(Array(pageSize).fill(-1))
          }
        }
      }
    }
  })

  it('is compacted in place as it is out of place', async () => {
    const setting = await setUp(20, layout, true)
    const source = rowsOf(setting.cache)
    const apart = await compact(setting.cache, setting.selection)
    const result = await compact(setting.cache, setting.selection, { target: 'in-place' })
    expectKept(result, setting, source)
    expectAttention(result, setting)
    expect(rowsOf(result)).toEqual(rowsOf(apart))
  })

  it('is compacted twice, and still tells original positions', async () => {
    const setting = await setUp(30, layout, false)
    const once = await compact(setting.cache, setting.selection)
    const random = new Random(31)
    const lengths = Int32Array.from(setting.kept, ({ length }) => length)
    const scores = Scores.from({
      layers: 3,
      sequences: 2,
      kvHeads: 3,
      lengths,
      data: Float32Array.from({ length: once.entries }, () => random.next()),
      bytesPerEntry: 1,
    })
    const policy = { ...policies.laprox({ keep: 0.5, sinks: 0, recent: 0 }), pooling: { kind: 'none' } } as const
    const selection = await select(scores, policy, { device })
    const twice = await compact(once, selection)
    const kept = setting.kept.map((tokens, x) => Array.from(selection.kept(Math.floor(x / 6), Math.floor(x / 3) % 2, x % 3), (t) => tokens[t]!))
    expectKept(twice, { ...setting, kept }, rowsOf(setting.cache))
    expectAttention(twice, { ...setting, kept })
  })
})

describe('compaction', () => {
  it('of everything is a copy, and of nothing is empty', async () => {
    for (const layout of ALL_LAYOUTS) {
      const all = await setUp(40, layout, true, { budget: { ratio: 1 } })
      const copy = await compact(all.cache, all.selection)
      expect(rowsOf(copy)).toEqual(rowsOf(all.cache))
      const none = await setUp(40, layout, true, { budget: { entries: 0 } })
      const empty = await compact(none.cache, none.selection)
      expect(empty.entries).toBe(0)
      const target = makePages(none, 16, 1, 1)
      expect((await compact(none.cache, none.selection, { target: 'pages', ...target, freePages: new Int32Array(0) })).entries).toBe(0)
    }
  })

  it('in place lists the pages that hold no row any more', async () => {
    for (const layout of ALL_LAYOUTS) {
      if (!('pageSize' in layout)) continue
      const setting = await setUp(50, layout, true)
      const tables = [0, 1, 2].map((layer) => setting.cache.pageTable(layer))
      const result = await compact(setting.cache, setting.selection, { target: 'in-place' })
      for (const [layer, table] of tables.entries()) {
        const width = table.dims.at(-1)!
        const pageOf = (x: number, token: number): number => {
          const row = layout.kind === 'head-pages' ? x : Math.floor(x / 3)
          return table.data[row * width + Math.floor(token / layout.pageSize)]!
        }
        const used = (lengths: readonly number[]): Set<number> =>
          new Set(lengths.flatMap((length, x) => Array.from({ length }, (_, t) => pageOf(x, t))))
        const before = used(setting.shape.lengths.slice(6 * layer, 6 * layer + 6))
        const after = used(setting.kept.slice(6 * layer, 6 * layer + 6).map(({ length }) => length))
        const freed = [...result.freedPages![layer]!].sort((a, b) => a - b)
        expect(freed).toEqual([...before].filter((page) => !after.has(page)).sort((a, b) => a - b))
      }
    }
  })

  it('does not run in place without positions to keep', async () => {
    const { cache, selection } = await setUp(60, { kind: 'contiguous' }, false)
    const before = rowsOf(cache)
    await expect(compact(cache, selection, { target: 'in-place' })).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
    expect(rowsOf(cache)).toEqual(before)
  })

  it('with too few free pages changes nothing', async () => {
    const setting = await setUp(61, { kind: 'contiguous' }, true)
    const total = pagesFor(setting.kept, 16).reduce((sum, n) => sum + n, 0)
    const target = makePages(setting, 16, total, 1)
    const run = (freePages: Int32Array) => compact(setting.cache, setting.selection, { target: 'pages', ...target, freePages })
    await expect(run(Int32Array.from(Array(total - 1).keys()))).rejects.toMatchObject({ code: 'OUT_OF_PAGES' })
    await expect(run(Int32Array.from({ length: total }, (_, i) => i + 1))).rejects.toMatchObject({ code: 'OUT_OF_BOUNDS' })
    await expect(run(Int32Array.from({ length: total }, (_, i) => i - 1))).rejects.toMatchObject({ code: 'OUT_OF_BOUNDS' })
    await expect(run(Int32Array.from({ length: total }, (_, i) => Math.floor(i / 2)))).rejects.toMatchObject({ code: 'OVERLAP' })
    expect([...target.positions[0]!.data]).toEqual(Array(total * 16).fill(-1))
    await expect(run(Int32Array.from(Array(total).keys()))).resolves.toBeDefined()
  })

  it('into pages that the cache itself uses is refused', async () => {
    const setting = await setUp(62, { kind: 'head-pages', pageSize: 16 }, true)
    const { cache } = setting
    const keys = [0, 1, 2].map((layer) => cache.keys(layer) as Tensor)
    const values = [0, 1, 2].map((layer) => cache.values(layer) as Tensor)
    const lists = keys.map((pool) => Int32Array.from(Array(pool.dims[0]).keys()))
    const before = rowsOf(cache)
    await expect(compact(cache, setting.selection, { target: 'pages', keys, values, freePages: lists })).rejects.toMatchObject({
      code: 'OVERLAP',
    })
    expect(rowsOf(cache)).toEqual(before)
  })

  it('in place of sequences that share a page is refused', async () => {
    const random = new Random(63)
    const lengths = [20, 20]
    const shape = drawShape(random, { layers: 1, sequences: 2, kvHeads: 1, headDim: 8, rows: 1, lengths, positions: true, type: 'float32' })
    const problem = makeProblem(random, shape)
    const built = buildCache(device, problem, 'float32', { kind: 'head-pages', pageSize: 16 }, random, { positions: true })
    const table = built.pageTable(0)
    const width = table.dims[2]!
    // The second sequence begins with the first page of the first.
    table.data[width] = table.data[0]!
    const scores = Scores.from({
      layers: 1,
      sequences: 2,
      kvHeads: 1,
      lengths: [20, 20],
      data: Float32Array.from({ length: 40 }, () => random.next()),
      bytesPerEntry: 1,
    } as never)
    const policy = { ...policies.laprox({ keep: 0.5, sinks: 0, recent: 0 }), pooling: { kind: 'none' } } as const
    const selection = await select(scores, policy, { device })
    const before = built.keys(0).data.slice()
    await expect(compact(built, selection, { target: 'in-place' })).rejects.toMatchObject({ code: 'OVERLAP' })
    expect(built.keys(0).data).toEqual(before)
    // Out of place it is what a shared prefix is for.
    await expect(compact(built, selection)).resolves.toBeDefined()
  })

  it('of a selection that was made for another cache is refused', async () => {
    const one = await setUp(64, { kind: 'contiguous' }, true, { budget: { ratio: 1 } })
    const other = await setUp(65, { kind: 'contiguous' }, true)
    await expect(compact(other.cache, one.selection)).rejects.toMatchObject({ code: 'OUT_OF_BOUNDS' })
  })
})
