import { Device, evict as evictFrom, fromFloat32, type KvCache, policies, score, select, toFloat32 } from 'laprox'
import { generateLayer, type Layer } from '#lib/cli/synthetic'
import { type Described, describe, describeCache, evictionOperations, llamaShape, shapeOf } from './layer.js'
import { binding, goal, type Measurement, type Settings, shareOf } from './measurement.js'
import { Needle } from './needle.js'
import { shareAboveThreshold } from './tightness.js'
import { time } from './timing.js'
import { arithmeticRate, faster, readRate } from './yardstick.js'

const policy = policies.laprox({ keep: 0.05 })

/** An eviction that estimates few candidates and computes the exact scores of fewer, beside one that ranks every exact score. */
export async function* evict({ quick, threads }: Settings): AsyncGenerator<Measurement> {
  using device = await Device.open('cpu', { threads })
  const needle = await Needle.load()
  for await (const { task, layers } of needle.caches(quick ? 1 : 4, policy.window)) {
    const rounds = quick ? 5 : 41
    yield measure(device, layers, `needle-lm after a prompt of '${task}'`, rounds)
    yield measure(device, layers.map(inBfloat16), `needle-lm, rounded to bfloat16, after a prompt of '${task}'`, rounds)
  }
  const shape = llamaShape(quick ? 4096 : 32768)
  yield measure(device, [generateLayer(shape)], 'a generated cache of one Llama-3.1-8B layer', quick ? 3 : 15)
}

/** As engines mostly hold caches. The output projection, which is factorized once, stays as it is. */
function inBfloat16({ queries, keys, values, projection }: Layer): Layer {
  const rounded = (tensor: Layer['keys']) => fromFloat32('bfloat16', toFloat32(tensor), tensor.dims)
  return { queries: rounded(queries), keys: rounded(keys), values: rounded(values), projection }
}

async function measure(device: Device, layers: readonly Layer[], name: string, rounds: number): Promise<Measurement> {
  const described = await describe(device, layers)
  const { model, cache, window } = described
  const { report } = await compareSelections(described)
  const scores = await score(model, cache, window, policy)
  const above = await shareAboveThreshold(device, layers, policy, scores, await select(scores, policy, { device }))
  const { threads } = device.info()
  const before = { arithmetic: await arithmeticRate(threads), read: await readRate(threads) }
  const pruned = (from: KvCache) => () => evictFrom(model, from, window, policy)
  const exhaustive = () => evictFrom(model, cache, window, policy, { exhaustive: true })
  const timings = await time({ pruned: pruned(cache), exhaustive }, rounds)
  const arithmetic = faster(before.arithmetic, await arithmeticRate(threads))
  const read = faster(before.read, await readRate(threads))
  const again = await time({ pruned: pruned(cache) }, rounds)
  const withNorms = describeCache(device, layers)
  await withNorms.computeValueNorms()
  const kept = await time({ pruned: pruned(withNorms), exhaustive }, rounds)
  const operations = layers.reduce((sum, layer) => sum + evictionOperations(shapeOf(layer), report.candidates / layers.length), 0)
  const bytes = cache.bytes + 2 * report.bytesAfter
  const measurement: Measurement = {
    benchmark: 'evict',
    name: `eviction of 95 % of ${name}`,
    parameters: {
      layers: layers.length,
      kvHeads: cache.kvHeads,
      tokens: cache.lengths(0)[0]!,
      headDim: cache.headDim,
      type: cache.type,
      threads,
    },
    ...timings.pruned,
    operations,
    bytes,
    ...binding(shareOf(arithmetic, operations, timings.pruned), shareOf(read, bytes, timings.pruned)),
    figures: {
      msExhaustive: timings.exhaustive.msMedian,
      msAgain: again.pruned.msMedian,
      msKeptNorms: kept.pruned.msMedian,
      entries: report.entries,
      candidates: report.candidates,
      candidatesPercent: (100 * report.candidates) / report.entries,
      exactScores: report.exactScores,
      aboveThresholdPercent: 100 * above,
    },
    goals: [goal('speed relative to ranking every exact score', timings.exhaustive.msMedian / timings.pruned.msMedian, 'at least', 5, 'times')],
    note:
      'operations: the logits of every key, the norm of every value, and estimates of the candidates; bytes: all keys and values once, and the kept rows twice; ' +
      'the share is that of the rate that binds; each comes right after an exhaustive one, whose time is msExhaustive, msAgain after another like itself, ' +
      'msKeptNorms is as the first, of a cache that keeps its value norms; the selections are the same to the bit; ' +
      'candidates: entries whose one-read bound reached the proven threshold; ' +
      'aboveThresholdPercent: of the entries, those whose bound from exact attention norms reaches the smallest score kept, without protected ones',
  }
  model.dispose()
  return measurement
}

/** Evicts by both paths. Throws where what they keep differs in one bit. */
async function compareSelections({ model, cache, window }: Described) {
  const pruned = await evictFrom(model, cache, window, policy)
  const exhaustive = await evictFrom(model, cache, window, policy, { exhaustive: true })
  if (pruned.report.path !== 'pruned') throw new Error(`the eviction was not pruned: ${pruned.report.fallback}`)
  const parts = (eviction: typeof pruned) => [
    eviction.selection.offsets,
    eviction.selection.tokens,
    ...Array.from({ length: cache.layers }, (_, layer) => [eviction.cache.keys(layer).data, eviction.cache.values(layer).data]).flat(),
  ]
  const others = parts(exhaustive)
  const same = parts(pruned).every((part, i) => Buffer.compare(bytes(part), bytes(others[i]!)) === 0)
  if (!same) throw new Error('the pruned and the exhaustive eviction keep different entries')
  return pruned
}

function bytes({ buffer, byteOffset, byteLength }: ArrayBufferView): Buffer {
  return Buffer.from(buffer as ArrayBuffer, byteOffset, byteLength)
}
