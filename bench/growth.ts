import { availableParallelism } from 'node:os'
import { compact, Device, evict, policies, score, select, Tensor } from 'laprox'
import { generateLayer, type Layer, type LayerShape } from '#lib/cli/synthetic'
import { describe, jointOperations, llamaShape, shapeOf } from './layer.js'
import type { Measurement, Settings } from './measurement.js'
import { type Task, time } from './timing.js'

const stages = ['score', 'evict', 'select', 'compact'] as const
type Stage = (typeof stages)[number]

/** Tokens at most where they grow, where the window or the threads do, and where groups do; the largest group; how much larger each step is. */
const full = { longest: 524288, middle: 32768, short: 8192, largest: 16, factor: 2 } as const
const small = { longest: 4096, middle: 4096, short: 1024, largest: 4, factor: 4 } as const

/** How long the stages take on one layer as the cache, the window, the groups of query heads and the threads grow. */
export async function* growth({ quick, threads }: Settings): AsyncGenerator<Measurement> {
  const { longest, middle, short, largest, factor } = quick ? small : full
  using device = await Device.open('cpu', { threads })
  const long = generateLongLayer(llamaShape(longest))
  for (const tokens of steps(1024, longest, factor)) yield* measure(device, lastTokens(long, tokens), 'tokens', stages)

  const watched = generateLayer({ ...llamaShape(middle), window: 128 })
  for (const window of steps(1, 128, factor)) yield* measure(device, lastQueries(watched, window), 'window', ['score', 'evict'])

  for (const group of steps(1, largest, factor)) {
    const layer = generateLayer({ ...llamaShape(short), queryHeads: group * llamaShape(short).kvHeads })
    yield* measure(device, layer, 'group', ['score', 'evict'])
  }

  const layer = lastQueries(watched, llamaShape(middle).window)
  for (const count of steps(1, availableParallelism(), factor)) {
    using other = await Device.open('cpu', { threads: count })
    yield* measure(other, layer, 'threads', stages)
  }
}

async function* measure(device: Device, layer: Layer, along: string, names: readonly Stage[]): AsyncGenerator<Measurement> {
  const shape = shapeOf(layer)
  const policy = policies.laprox({ keep: 0.05, window: shape.window })
  const { model, cache, window } = await describe(device, [layer])
  const scores = await score(model, cache, window, policy)
  const selection = await select(scores, policy, { device })
  const tasks: Readonly<Record<Stage, Task>> = {
    score: () => score(model, cache, window, policy),
    evict: () => evict(model, cache, window, policy),
    select: () => select(scores, policy, { device }),
    compact: () => compact(cache, selection),
  }
  const timings = await time(Object.fromEntries(names.map((name) => [name, tasks[name]])) as typeof tasks, rounds(shape))
  model.dispose()
  const { queryHeads, kvHeads, ...rest } = shape
  const parameters = { kvHeads, group: queryHeads / kvHeads, ...rest, type: cache.type, threads: device.info().threads }
  for (const name of names) {
    yield {
      benchmark: 'growth',
      name,
      parameters,
      along,
      ...timings[name],
      note: 'score: every exact joint score; evict: the same 5 % without most of them, to compacted rows; select: 5 % of given scores, pooled; compact: their rows into fresh ragged memory',
    }
  }
}

/** Few for what takes seconds. */
function rounds(shape: LayerShape): number {
  return Math.min(15, Math.max(3, Math.round(3e12 / jointOperations(shape))))
}

/** low, factor low, factor² low ... and high. */
function steps(low: number, high: number, factor: number): number[] {
  return low < high ? [low, ...steps(Math.min(factor * low, high), high, factor)] : [high]
}

/** A layer as generateLayer makes it, a KV head at a time: in float32 all of it would not fit into the memory of a small machine. */
function generateLongLayer(shape: LayerShape): Layer {
  const { kvHeads, headDim, tokens } = shape
  const dims = [kvHeads, tokens, headDim]
  const [keys, values] = [Tensor.zeros('bfloat16', dims), Tensor.zeros('bfloat16', dims)]
  for (let head = 0; head < kvHeads; head++) {
    const one = generateLayer({ ...shape, queryHeads: 1, kvHeads: 1, modelDim: 1 }, head + 1)
    keys.data.set(one.keys.data as Uint16Array, head * tokens * headDim)
    values.data.set(one.values.data as Uint16Array, head * tokens * headDim)
  }
  const { queries, projection } = generateLayer({ ...shape, tokens: 1 })
  return { queries, keys, values, projection }
}

/** A view. */
function lastTokens({ queries, keys, values, projection }: Layer, tokens: number): Layer {
  return { queries, keys: lastRows(keys, tokens), values: lastRows(values, tokens), projection }
}

/** A view. */
function lastQueries({ queries, ...rest }: Layer, window: number): Layer {
  return { queries: lastRows(queries, window), ...rest }
}

/** Of each head. */
function lastRows({ type, data, dims }: Layer['keys'], rows: number): Layer['keys'] {
  const [heads, all, width] = dims as [number, number, number]
  return new Tensor(type, data, [heads, rows, width], { strides: [all * width, width, 1], offset: (all - rows) * width })
}
