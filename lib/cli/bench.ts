import { totalmem } from 'node:os'
import { setImmediate } from 'node:timers/promises'
import { Command, InvalidArgumentError, Option } from 'commander'
import { KvCache } from '../cache.js'
import { compact } from '../compact.js'
import type { Device } from '../device.js'
import { LaproxError, throwIfAborted } from '../errors.js'
import { evict } from '../evict.js'
import { AttentionModel } from '../model.js'
import { policies } from '../policy.js'
import { score } from '../score.js'
import { select } from '../selection.js'
import { elementBytes, type FloatType, type Tensor } from '../tensor.js'
import type { Window } from '../window.js'
import { readCount, readShare } from './options.js'
import { type DeviceOptions, describeDevice, deviceFacts, deviceOptions, openDevice } from './session.js'
import { generateLayer, type Layer } from './synthetic.js'
import { bytes, count, duration, percent, table } from './table.js'
import { printJson, type Terminal, watch } from './terminal.js'
import { type Timing, timing } from './timing.js'

/** Times that each stage runs, after once unseen. */
const ROUNDS = 7

interface Options extends DeviceOptions {
  readonly tokens: number
  readonly layers: number
  readonly queryHeads: number
  readonly kvHeads: number
  readonly headDim: number
  readonly dtype: FloatType
  readonly keep: number
}

export function benchCommand(terminal: Terminal): Command {
  const command = new Command('bench')
    .description("times scoring, selecting, compacting and a whole eviction on a generated cache whose attention is like a trained model's")
    .option('--tokens <n>', 'cached tokens', readCount, 32768)
    .option('--layers <n>', 'layers', readCount, 1)
    .option('--query-heads <n>', 'query heads', readCount, 32)
    .option('--kv-heads <n>', 'KV heads', readCount, 8)
    .option('--head-dim <n>', 'dimensions of a head, a multiple of 8 from 24 to 256', readHeadDim, 128)
    .addOption(new Option('--dtype <type>', 'of the cache').choices(['bfloat16', 'float16', 'float32']).default('bfloat16'))
    .addOption(new Option('--keep <share>', 'how much of the cache to keep, as 5% or 0.05').argParser(readShare).default(0.05, '5%'))
  return deviceOptions(command)
    .addHelpText('after', '\nExample:\n  laprox bench --tokens 8192 --layers 4 --keep 10%')
    .action((options: Options) => bench(options, terminal))
}

function readHeadDim(text: string): number {
  const dim = Number(text)
  // The generator's features and a few dimensions of noise.
  if (dim % 8 === 0 && dim >= 24 && dim <= 256) return dim
  throw new InvalidArgumentError('Expected a multiple of 8 from 24 to 256')
}

async function bench(options: Options, terminal: Terminal): Promise<void> {
  using device = await openDevice(options)
  const timings = await measure(device, options, terminal)
  const { tokens, layers, queryHeads, kvHeads, headDim, dtype, keep } = options
  const entries = layers * kvHeads * tokens
  const perSecond = ({ msMedian }: Timing): number => entries / (msMedian / 1000)
  if (options.json) {
    printJson(terminal, {
      device: deviceFacts(device),
      cache: { tokens, layers, queryHeads, kvHeads, headDim, dtype, entries },
      keep,
      stages: Object.fromEntries(timings.map(([stage, times]) => [stage, { ...times, entriesPerSecond: perSecond(times) }])),
    })
    return
  }
  const shape = `${layers} ${layers === 1 ? 'layer' : 'layers'}, ${queryHeads} query heads, ${kvHeads} KV heads of ${headDim}, ${count(tokens)} tokens, ${dtype}`
  const rows = timings.map(([stage, times]) => [
    stage,
    ...[times.msMedian, times.msP10, times.msP90].map(duration),
    `${(perSecond(times) / 1e6).toPrecision(3)} M`,
  ])
  const head = table(
    [
      ['cache', `${shape}, ${count(entries)} entries, ${bytes(entries * 2 * headDim * elementBytes(dtype))}`],
      ['keeps', `${percent(keep)}, policy laprox`],
      ['device', describeDevice(device)],
      ['runs', `${ROUNDS} of each stage, in turn`],
    ],
    Number.POSITIVE_INFINITY,
  )
  terminal.stdout.write(`${head}\n\n${table([['', 'median', 'p10', 'p90', 'entries a second'], ...rows])}\n`)
}

async function measure(device: Device, options: Options, terminal: Terminal): Promise<[stage: string, Timing][]> {
  const policy = policies.laprox({ keep: options.keep })
  // Numbers that cannot be are told before the work begins.
  AttentionModel.create(device, options).dispose()
  const layers = await watch(terminal, 'generating', (hooks) => generate(options, policy.window, hooks))
  const { model, cache, window } = await describe(device, options, layers, terminal.signal)
  using _model = model
  await model.ready
  const { signal } = terminal
  using scores = await score(model, cache, window, policy, { signal })
  using selection = await select(scores, policy, { device, signal })
  const stages: Record<string, () => Promise<Disposable | undefined>> = {
    score: () => score(model, cache, window, policy, { signal }),
    select: () => select(scores, policy, { device, signal }),
    compact: () => compact(cache, selection, { signal }),
    evict: () => evict(model, cache, window, policy, { signal }).then((evicted) => evicted.cache),
  }
  const samples = new Map(Object.keys(stages).map((stage) => [stage, [] as number[]]))
  await watch(terminal, 'timing', async ({ progress }) => {
    for (let round = 0; round <= ROUNDS; round++) {
      for (const [stage, run] of Object.entries(stages)) {
        const begun = performance.now()
        const result = await run()
        if (round > 0) samples.get(stage)!.push(performance.now() - begun)
        result?.[Symbol.dispose]()
      }
      progress((round + 1) / (ROUNDS + 1))
    }
  })
  return [...samples].map(([stage, times]) => [stage, timing(times)])
}

/** Layers with different contents. */
async function generate(
  { tokens, layers, queryHeads, kvHeads, headDim, dtype }: Options,
  window: number,
  { signal, progress }: { readonly signal: AbortSignal; readonly progress: (done: number) => void },
): Promise<Layer[]> {
  const needed = layers * kvHeads * tokens * 2 * headDim * elementBytes(dtype)
  if (needed > totalmem()) {
    throw new LaproxError('OUT_OF_MEMORY', `the cache would take ${bytes(needed)}; the machine has ${bytes(totalmem())}`)
  }
  const shape = { queryHeads, kvHeads, headDim, modelDim: queryHeads * headDim, window, tokens }
  const generated: Layer[] = []
  for (let layer = 0; layer < layers; layer++) {
    throwIfAborted(signal)
    generated.push(generateLayer(shape, layer + 1, dtype))
    progress((layer + 1) / layers)
    // Let a signal in.
    await setImmediate()
  }
  return generated
}

async function describe(device: Device, { queryHeads, kvHeads, headDim }: Options, layers: readonly Layer[], signal: AbortSignal) {
  const placed = (list: readonly Tensor[]): Promise<Tensor[]> => Promise.all(list.map((tensor) => tensor.to(device, { signal })))
  const outputProjections = layers.map(({ projection }) => projection)
  const model = AttentionModel.create(device, { layers: layers.length, queryHeads, kvHeads, headDim, outputProjections })
  const cache = KvCache.from(device, { keys: await placed(layers.map(({ keys }) => keys)), values: await placed(layers.map(({ values }) => values)) })
  const window: Window = { queries: await placed(layers.map(({ queries }) => queries)) }
  return { model, cache, window }
}
