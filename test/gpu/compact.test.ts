import { expect, it } from 'vitest'
import { compact, type KvCache, type Policy, policies, Scores, type Selection, select, Tensor } from '../../lib/index.js'
import type { Problem } from '../oracle/problem.js'
import { buildCache, type Layout, OWN_LENGTH_LAYOUTS, SHARED_LENGTH_LAYOUTS, tensor } from '../support/build.js'
import { storage, write } from '../support/half.js'
import { drawShape, makeProblem, ownLengths, type Shape, sharedLengths } from '../support/problem.js'
import { Random } from '../support/random.js'
import { readRows } from '../support/read.js'
import { cpu, device, Mirror, onGpu, toGpu, toHost } from './gpu.js'

interface Setting {
  readonly problem: Problem
  readonly shape: Shape
  readonly host: KvCache
  readonly cache: KvCache
  readonly hostSelection: Selection
  readonly selection: Selection
  readonly mirror: Mirror
}

/** Any cache in a layout, and a random choice of what to keep of it, on the host and on the GPU. */
async function setUp(seed: number, layout: Layout, positions: boolean, rule: Partial<Policy> = {}): Promise<Setting> {
  const random = new Random(seed)
  const own = layout.kind === 'ragged' || layout.kind === 'head-pages'
  const shape = drawShape(random, {
    layers: 3,
    sequences: 2,
    kvHeads: 3,
    groupSize: 1,
    headDim: random.pick([8, 24, 64, 128, 256]),
    rows: 1,
    lengths: (own ? ownLengths : sharedLengths)(random, 3, 2, 3, 150),
    positions,
    givenBase: undefined,
  } as unknown as Partial<Shape>)
  const problem = makeProblem(random, shape)
  const host = buildCache(cpu, problem, shape.type, layout, random, { positions, valueNorms: true })
  const scores = Scores.from({
    layers: 3,
    sequences: 2,
    kvHeads: 3,
    lengths: Int32Array.from(shape.lengths),
    data: Float32Array.from({ length: host.entries }, () => random.next()),
  })
  const policy = { ...policies.laprox({ keep: 0.4, sinks: 0, recent: 0 }), pooling: { kind: 'none' }, ...rule } as const
  const hostSelection = await select(scores, policy, { device: cpu })
  const mirror = new Mirror(device)
  return { problem, shape, host, hostSelection, selection: await hostSelection.to(device), mirror, cache: await toGpu(host, mirror) }
}

const rowsOf = (cache: KvCache) => Array.from({ length: 18 }, (_, x) => readRows(cache, Math.floor(x / 6), Math.floor(x / 3) % 2, x % 3))

async function expectAlike(actual: KvCache, expected: KvCache): Promise<void> {
  const host = await toHost(actual)
  expect(actual.kind).toBe(expected.kind)
  for (let layer = 0; layer < 3; layer++) expect(actual.lengths(layer)).toEqual(expected.lengths(layer))
  expect(rowsOf(host)).toEqual(rowsOf(expected))
  expect(actual.contextLengths()).toEqual(expected.contextLengths())
  expect(actual.pagesUsed).toEqual(expected.pagesUsed)
  expect(actual.freedPages).toEqual(expected.freedPages)
}

const LAYOUTS = [...SHARED_LENGTH_LAYOUTS, ...OWN_LENGTH_LAYOUTS, ...[8, 32, 128, 256].map((pageSize): Layout => ({ kind: 'NHD', pageSize }))].map(
  (layout) => [Object.values(layout).join(' '), layout] as const,
)

onGpu('a compaction', () => {
  it.each(LAYOUTS)('of a %s cache to ragged rows is that of the CPU', async (_, layout) => {
    for (const positions of [false, true]) {
      const { host, cache, hostSelection, selection, mirror } = await setUp(1, layout, positions)
      const result = await compact(cache, selection)
      const expected = await compact(host, hostSelection)
      await expectAlike(result, expected)
      for (let layer = 0; layer < 3; layer++) {
        expect(await result.valueNorms(layer).getData()).toEqual(await expected.valueNorms(layer).getData())
        expect(result.rowStarts(layer)).toEqual(expected.rowStarts(layer))
      }
      expect(await mirror.changed()).toEqual([])
      result.dispose()
      selection.dispose()
      await mirror.dispose()
    }
  })

  it.each(LAYOUTS)('of a %s cache to pages is that of the CPU', async (_, layout) => {
    for (const [seed, pageSize] of [1, 16, 64].entries()) {
      for (const pools of [1, 3] as const) {
        const setting = await setUp(10 + seed, layout, pools === 1)
        const { host, cache, hostSelection, selection, mirror, shape } = setting
        const pages = [...hostSelection.counts].reduce((sum, n) => sum + Math.ceil(n / pageSize), 0) + 5
        const pool = (): Tensor => {
          const data = storage(shape.type, pages * pageSize * shape.headDim)
          for (let i = 0; i < data.length; i++) write(shape.type, data, i, Number.NaN)
          return tensor(shape.type, data, [pages, pageSize, shape.headDim])
        }
        const perPool = <T>(make: () => T): T[] => Array.from({ length: pools }, make)
        const random = new Random(seed)
        const target = {
          keys: perPool(pool),
          values: perPool(pool),
          valueNorms: perPool(() => new Tensor('float32', new Float32Array(pages * pageSize).fill(-1), [pages, pageSize])),
          positions: perPool(() => new Tensor('int32', new Int32Array(pages * pageSize).fill(-1), [pages, pageSize])),
        }
        const freePages = perPool(() => Int32Array.from(random.shuffled(Array(pages).keys())))
        const all = (list: Tensor[]): Promise<Tensor[]> => Promise.all(list.map((each) => mirror.tensor(each)))
        const there = {
          keys: await all(target.keys),
          values: await all(target.values),
          ...(seed === 1 ? {} : { positions: await all(target.positions), valueNorms: await all(target.valueNorms) }),
        }
        const result = await compact(cache, selection, { target: 'pages', ...there, freePages })
        const expected = await compact(host, hostSelection, { target: 'pages', ...target, freePages })
        await expectAlike(result, expected)
        // The pools are those of the CPU now, to the last byte between the guard bands; nothing else has changed.
        expect(await mirror.changed()).toEqual([])
        for (let layer = 0; layer < 3; layer++) {
          expect(await result.pageTable(layer).getData()).toEqual(await expected.pageTable(layer).getData())
        }
        result.dispose()
        selection.dispose()
        await mirror.dispose()
      }
    }
  })

  it.each(LAYOUTS)('of a %s cache in place is that of the CPU', async (_, layout) => {
    for (const rule of [{}, { budget: { ratio: 0.03 } }, { scope: 'head' }] as const) {
      const { host, cache, hostSelection, selection, mirror } = await setUp(20, layout, true, rule)
      const result = await compact(cache, selection, { target: 'in-place' })
      expect(cache.disposed).toBe(true)
      await expectAlike(result, await compact(host, hostSelection, { target: 'in-place' }))
      await mirror.changed()
      selection.dispose()
      await mirror.dispose()
    }
  })

  it('of everything is a copy, and of nothing is empty', async () => {
    for (const ratio of [1, 1e-9]) {
      const { host, cache, hostSelection, selection } = await setUp(30, { kind: 'NHD', pageSize: 16 }, false, { budget: { ratio } })
      expect(selection.entries).toBe(ratio === 1 ? host.entries : 0)
      await expectAlike(await compact(cache, selection), await compact(host, hostSelection))
    }
  })

  it('refuses too few pages, pages that do not exist, and a selection of the host', async () => {
    const { cache, hostSelection, selection, shape } = await setUp(31, { kind: 'contiguous' }, true)
    const keys = [await Tensor.allocate(device, shape.type, [4, 16, shape.headDim])]
    const values = [await Tensor.allocate(device, shape.type, [4, 16, shape.headDim])]
    const pages = { target: 'pages', keys, values } as const
    await expect(compact(cache, selection, { ...pages, freePages: Int32Array.of(0, 1) })).rejects.toMatchObject({
      code: 'OUT_OF_PAGES',
      message: expect.stringMatching(/^freePages has 2 pages/),
    })
    await expect(compact(cache, selection, { ...pages, freePages: new Int32Array(400).fill(77) })).rejects.toMatchObject({ code: 'OUT_OF_BOUNDS' })
    await expect(compact(cache, hostSelection)).rejects.toMatchObject({ code: 'DEVICE_MISMATCH' })
    expect(cache.disposed).toBe(false)
  })
})
