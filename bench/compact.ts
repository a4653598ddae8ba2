import { compact as compactCache, Device, KvCache, policies, Scores, type Selection, select, Tensor } from 'laprox'
import { Random } from '#lib/cli/random'
import type { Timing } from '#lib/cli/timing'
import { llamaShape } from './layer.js'
import { goal, type Measurement, type Reached, type Settings, shareOf } from './measurement.js'
import { time } from './timing.js'
import { copyRate } from './yardstick.js'

const PAGE_SIZE = 16

/** Moving the 5 % of a cache that are kept, beside memcpy of as many bytes. */
export async function* compact({ quick, threads: most }: Settings): AsyncGenerator<Measurement> {
  const layers = quick ? 1 : 8
  const { keys, values } = cacheTensors(layers, llamaShape(32768))
  const turns = quick ? 1 : 9
  const rounds = quick ? 5 : 25
  for (const threads of new Set([most, 1])) {
    using device = await Device.open('cpu', { threads })
    const cache = KvCache.from(device, { keys, values })
    const selections = await Promise.all([1, 2, 3, 4].map((seed) => chooseRows(device, cache, seed)))
    const pages = pagePool(cache, selections)
    const { entries } = selections[0]!
    const bytes = entries * 2 * cache.headDim * 2
    let calls = 0
    const next = () => selections[calls++ % selections.length]! // no cache holds its rows any more
    // What the machine's memory does changes by half from one second to the next: memcpy and compaction take turns, and the turn in the middle counts.
    const inTurns = async (fresh: boolean, run: () => Promise<KvCache>): Promise<Turn> => {
      const all: Turn[] = []
      for (let turn = 0; turn < turns; turn++) {
        const rate = await copyRate(threads, bytes, fresh)
        const { timing } = await time({ timing: run }, rounds)
        all.push({ timing, reached: shareOf(rate, bytes, timing) })
      }
      return all.sort((one, other) => (one.reached.share ?? 0) - (other.reached.share ?? 0))[turns >> 1]!
    }
    const toPages = await inTurns(false, () => compactCache(cache, next(), pages))
    const toRagged = await inTurns(true, () => compactCache(cache, next()))
    const parameters = {
      layers,
      kvHeads: cache.kvHeads,
      tokens: cache.lengths(0)[0]!,
      headDim: cache.headDim,
      type: cache.type,
      rows: entries,
      threads,
    }
    for (const [name, { timing, reached }] of [
      [`compaction into pages of ${PAGE_SIZE} tokens of a pool in use`, toPages],
      ['compaction into fresh ragged memory', toRagged],
    ] as const) {
      yield {
        benchmark: 'compact',
        name: `${name}, ${threads === 1 ? 'one thread' : `${threads} threads`}`,
        parameters,
        ...timing,
        bytes,
        ...reached,
        ...(reached.share !== undefined && { goals: [goal('share of the rate of memcpy', reached.share * 100, 'at least', 70, '%')] }),
        note: `bytes: of the kept rows of keys and values, counted once; memcpy copies as many from memory that no cache holds, in ${turns} turns with compaction, of which that of the middle share is shown`,
      }
    }
  }
}

/** Some compactions, and what they reach of what memcpy did right before. */
interface Turn {
  readonly timing: Timing
  readonly reached: Reached
}

/** Written to, so that it is in use: what it holds plays no part. */
function filled<T extends 'bfloat16' | 'int32'>(type: T, dims: number[]): Tensor<T> {
  const tensor = Tensor.zeros(type, dims)
  tensor.data.fill(1)
  return tensor
}

/** Keys and values that fill memory. */
function cacheTensors(layers: number, { kvHeads, tokens, headDim }: ReturnType<typeof llamaShape>): { keys: Tensor[]; values: Tensor[] } {
  const one = () => filled('bfloat16', [kvHeads, tokens, headDim])
  return { keys: Array.from({ length: layers }, one), values: Array.from({ length: layers }, one) }
}

/** The rows that the preset laprox keeps of log-normal scores: runs of seven and more, anywhere. */
function chooseRows(device: Device, { layers, kvHeads, entries }: KvCache, seed: number): Promise<Selection> {
  const random = new Random(seed)
  const data = new Float32Array(entries).map(() => Math.exp(2 * random.noise()))
  const scores = Scores.from({ layers, kvHeads, lengths: new Int32Array(layers * kvHeads).fill(entries / layers / kvHeads), data })
  return select(scores, policies.laprox({ keep: 0.05 }), { device })
}

/** One pool for all layers, with the pages that each of the selections needs. */
function pagePool({ headDim }: KvCache, selections: readonly Selection[]) {
  const count = Math.max(...selections.map(({ counts }) => counts.reduce((sum, rows) => sum + Math.ceil(rows / PAGE_SIZE), 0)))
  const dims = [count, PAGE_SIZE, headDim]
  return {
    target: 'pages',
    keys: [filled('bfloat16', dims)],
    values: [filled('bfloat16', dims)],
    positions: [filled('int32', dims.slice(0, 2))],
    freePages: Int32Array.from({ length: count }, (_, page) => page),
  } as const
}
