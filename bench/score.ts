import { join } from 'node:path'
import { generateLayer } from '#lib/cli/synthetic'
import { jointOperations, llamaShape, writeLayer } from './layer.js'
import { goal, type Measurement, type Settings, shareOf } from './measurement.js'
import { tellingMemory } from './memory.js'
import { inProcess } from './process.js'
import type { ScoreJob, ScoreOutcome } from './score-process.js'
import { arithmeticRate, faster, scratchFolder } from './yardstick.js'

/** Every exact joint score of one layer: its speed and memory, beside the same formula in ONNX Runtime. */
export async function* score({ quick, threads }: Settings): AsyncGenerator<Measurement> {
  const shape = llamaShape(quick ? 4096 : 32768)
  const file = join(scratchFolder(), 'layer.safetensors')
  await writeLayer(file, generateLayer(shape))
  const job = { shape, file, threads }
  const memory = {
    laprox: (await perform({ ...job, engine: 'laprox', rounds: 0 })).memory!,
    onnx: (await perform({ ...job, engine: 'onnxruntime', rounds: 0 })).memory!,
  }
  const rounds = quick ? 3 : 15
  const before = await arithmeticRate(threads)
  const laprox = await perform({ ...job, engine: 'laprox', rounds })
  const rate = faster(before, await arithmeticRate(threads))
  const onnx = await perform({ ...job, engine: 'onnxruntime', rounds })
  const difference = largestDifference(laprox.scores, onnx.scores)
  if (!(difference < 1e-3)) throw new Error(`the scores of laprox and ONNX Runtime differ by ${difference}`)

  const operations = jointOperations(shape)
  const reached = shareOf(rate, operations, laprox.timing!)
  yield {
    benchmark: 'score',
    name: 'every exact joint score of one layer',
    parameters: { ...shape, type: 'bfloat16', threads },
    ...laprox.timing,
    operations,
    ...reached,
    figures: memory.laprox,
    goals: [
      ...(reached.share === undefined ? [] : [goal('share of the rate of multiply-adds', reached.share * 100, 'at least', 50, '%')]),
      goal('scratch memory', memory.laprox.workingMiB, 'at most', 64, 'MiB'),
      goal('speed relative to ONNX Runtime', onnx.timing!.msMedian / laprox.timing!.msMedian, 'at least', 1, 'times'),
      goal('memory relative to ONNX Runtime', (100 * memory.laprox.workingMiB) / memory.onnx.workingMiB, 'at most', 25, '%'),
    ],
    note: 'workingMiB is what the first scoring adds to the resident memory of a process that holds the inputs, its 4 bytes a score included',
  }
  yield {
    benchmark: 'score',
    name: 'the same formula as an ONNX graph in onnxruntime-node',
    parameters: { ...shape, type: 'float32', threads },
    ...onnx.timing,
    operations,
    ...shareOf(rate, operations, onnx.timing!),
    figures: { ...memory.onnx, largestDifference: difference },
    note: "the matrices W_h W_h'^T are computed beforehand; largestDifference is that between the scores of both, as a share of the larger one",
  }
}

async function perform(job: ScoreJob): Promise<ScoreOutcome> {
  const options = {
    execArgv: [...process.execArgv, '--expose-gc'],
    env: job.rounds === 0 ? { ...process.env, ...tellingMemory } : process.env,
  }
  for await (const outcome of inProcess<ScoreOutcome>('score-process.ts', job, options)) return outcome
  throw new Error(`scoring with ${job.engine} ended without an outcome`)
}

/** Between scores, as a share of the larger. */
function largestDifference(a: Float32Array, b: Float32Array): number {
  let largest = 0
  a.forEach((value, i) => {
    largest = Math.max(largest, Math.abs(value - b[i]!) / Math.max(value, b[i]!, 1e-12))
  })
  return largest
}
