import { compact as compactCache, Device, KvCache, policies, Scores, type Selection, select, Tensor } from 'laprox'
import { Random } from '#lib/cli/random'
import { llamaShape } from './layer.js'
import { goal, type Measurement, type Settings, shareOf } from './measurement.js'
import { time } from './timing.js'
import { copyRate, faster } from './yardstick.js'

const PAGE_SIZE = 16

/** Moving the 5 % of a cache that are kept, beside memcpy of as many bytes. */
export async function* compact({ quick, threads: most }: Settings): AsyncGenerator<Measurement> {
  const layers = quick ? 1 : 8
  const { keys, values } = cacheTensors(layers, llamaShape(32768))
  const rounds = quick ? 5 : 41
  for (const threads of new Set([most, 1])) {
    using device = await Device.open('cpu', { threads })
    const cache = KvCache.from(device, { keys, values })
    const selection = await chooseRows(device, cache)
    const pages = pagePool(cache, selection)
    const bytes = selection.entries * 2 * cache.headDim * 2
    const before = { inUse: await copyRate(threads, bytes, false), fresh: await copyRate(threads, bytes, true) }
    const { toPages, toRagged } = await time(
      {
        toPages: () => compactCache(cache, selection, pages),
        toRagged: () => compactCache(cache, selection),
      },
      rounds,
    )
    const rates = {
      inUse: faster(before.inUse, await copyRate(threads, bytes, false)),
      fresh: faster(before.fresh, await copyRate(threads, bytes, true)),
    }
    const parameters = {
      layers,
      kvHeads: cache.kvHeads,
      tokens: cache.lengths(0)[0]!,
      headDim: cache.headDim,
      type: cache.type,
      rows: selection.entries,
      threads,
    }
    for (const [name, timing, rate] of [
      [`compaction into pages of ${PAGE_SIZE} tokens of a pool in use`, toPages, rates.inUse],
      ['compaction into fresh ragged memory', toRagged, rates.fresh],
    ] as const) {
      const reached = shareOf(rate, bytes, timing)
      yield {
        benchmark: 'compact',
        name: `${name}, ${threads === 1 ? 'one thread' : `${threads} threads`}`,
        parameters,
        ...timing,
        bytes,
        ...reached,
        ...(reached.share !== undefined && { goals: [goal('share of the rate of memcpy', reached.share * 100, 'at least', 70, '%')] }),
        note: 'bytes: of the kept rows of keys and values, counted once; memcpy copies as many from memory that no cache holds',
      }
    }
  }
}

/** Keys and values that fill memory: what they hold plays no part. */
function cacheTensors(layers: number, { kvHeads, tokens, headDim }: ReturnType<typeof llamaShape>): { keys: Tensor[]; values: Tensor[] } {
  const one = (_: unknown, i: number) => new Tensor('bfloat16', new Uint16Array(kvHeads * tokens * headDim).fill(i + 1), [kvHeads, tokens, headDim])
  return { keys: Array.from({ length: layers }, one), values: Array.from({ length: layers }, one) }
}

/** The rows that the preset laprox keeps of log-normal scores: runs of seven and more, anywhere. */
function chooseRows(device: Device, { layers, kvHeads, entries }: KvCache): Promise<Selection> {
  const random = new Random(1)
  const data = new Float32Array(entries).map(() => Math.exp(2 * random.noise()))
  const scores = Scores.from({ layers, kvHeads, lengths: new Int32Array(layers * kvHeads).fill(entries / layers / kvHeads), data })
  return select(scores, policies.laprox({ keep: 0.05 }), { device })
}

/** One pool for all layers, with the pages that a selection needs. */
function pagePool({ headDim }: KvCache, selection: Selection) {
  const count = selection.counts.reduce((sum, rows) => sum + Math.ceil(rows / PAGE_SIZE), 0)
  const dims = [count, PAGE_SIZE, headDim]
  const filled = () => new Tensor('bfloat16', new Uint16Array(count * PAGE_SIZE * headDim).fill(1), dims)
  return {
    target: 'pages',
    keys: [filled()],
    values: [filled()],
    positions: [new Tensor('int32', new Int32Array(count * PAGE_SIZE).fill(1), dims.slice(0, 2))],
    freePages: Int32Array.from({ length: count }, (_, page) => page),
  } as const
}
