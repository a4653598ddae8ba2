import { Device, policies, score } from 'laprox'
import type { LayerShape } from '#lib/cli/synthetic'
import type { Timing } from '#lib/cli/timing'
import { GramSession } from './gram-session.js'
import { describe, readLayer } from './layer.js'
import { residentMemory } from './memory.js'
import { time } from './timing.js'

// Scores a layer with one engine, in a process of its own so that its memory can be told: score.ts starts it.

/** What score.ts asks for: how long `rounds` scorings take, or for 0 how much memory the first one does. */
export interface ScoreJob {
  readonly engine: 'laprox' | 'onnxruntime'
  readonly shape: LayerShape
  /** The layer's file. */
  readonly file: string
  readonly threads: number
  readonly rounds: number
}

/** What it is told. */
export interface ScoreOutcome {
  readonly scores: Float32Array
  /** MiB resident at most, and how much of that came with the scoring: the inputs were there before. */
  readonly memory?: { readonly peakMiB: number; readonly workingMiB: number }
  readonly timing?: Timing
}

async function open({ engine, shape, file, threads }: ScoreJob): Promise<() => Promise<Float32Array>> {
  const layer = await readLayer(file)
  if (engine === 'onnxruntime') {
    const session = await GramSession.open(shape, layer, threads)
    return () => session.run()
  }
  const { model, cache, window } = await describe(await Device.open('cpu', { threads }), [layer])
  const policy = policies.laprox({ keep: 0.05 })
  return async () => (await score(model, cache, window, policy)).data
}

async function perform(job: ScoreJob): Promise<ScoreOutcome> {
  const run = await open(job)
  let scores: Float32Array = new Float32Array(0)
  const task = async (): Promise<void> => {
    scores = await run()
  }
  if (job.rounds > 0) {
    const { timing } = await time({ timing: task }, job.rounds)
    return { scores, timing }
  }
  const { before, peak } = await residentMemory(task)
  return { scores, memory: { peakMiB: peak, workingMiB: peak - before } }
}

process.once('message', async (job: ScoreJob) => {
  const outcome = await perform(job)
  process.send!(outcome, () => process.exit())
})
