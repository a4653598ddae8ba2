import { readFileSync } from 'node:fs'
import { performance } from 'node:perf_hooks'
import { Device, policies, Scores, select } from 'laprox'
import { Random } from '#lib/cli/random'
import { timing } from '#lib/cli/timing'
import { goal, type Measurement, type Settings } from './measurement.js'
import { time } from './timing.js'

/**
 * What an asynchronous selection of 1,000 scores costs the JavaScript thread, everything included: checks, the call, the ranking
 * (of so few scores it is done by this thread), the promise. Selections are awaited one after the other.
 */
export async function* latency({ quick, threads }: Settings): AsyncGenerator<Measurement> {
  using device = await Device.open('cpu', { threads })
  const random = new Random(1)
  const data = new Float32Array(1000).map(() => random.uniform())
  const scores = Scores.from({ layers: 1, kvHeads: 1, lengths: [data.length], data })
  const policy = policies.laprox({ keep: 0.1 })
  const batch = quick ? 500 : 5000
  const knowsCore = threadNanoseconds() !== undefined
  const active: number[] = []
  const settled: number[] = []

  const { each } = await time(
    {
      each: async () => {
        const begin = { loop: performance.eventLoopUtilization(), core: threadNanoseconds() ?? 0, clock: performance.now() }
        for (let i = 0; i < batch; i++) await select(scores, policy, { device })
        settled.push((performance.now() - begin.clock) / batch)
        active.push(performance.eventLoopUtilization(begin.loop).active / batch)
        return knowsCore ? ((threadNanoseconds() ?? 0) - begin.core) / 1e6 / batch : active.at(-1)
      },
    },
    quick ? 3 : 21,
  )
  yield {
    benchmark: 'latency',
    name: 'an asynchronous selection of 1,000 scores, on the JavaScript thread',
    parameters: { scores: data.length, awaited: batch, threads },
    ...each,
    figures: { msActive: timing(active).msMedian, msUntilSettled: timing(settled).msMedian },
    goals: [goal('JavaScript-thread time', 1000 * each.msMedian, 'below', 15, 'µs')],
    note: knowsCore
      ? 'time that the thread was on a core (/proc/thread-self/schedstat), system calls and wake-ups included; msActive: active time of the event loop by the clock (performance.eventLoopUtilization); msUntilSettled: from call to result'
      : 'active time of the event loop by the clock (performance.eventLoopUtilization)',
  }
}

/** Nanoseconds that the calling thread has been on a core so far; undefined where the system does not say. */
function threadNanoseconds(): number | undefined {
  try {
    return Number(readFileSync('/proc/thread-self/schedstat', 'utf8').split(' ')[0])
  } catch {
    return undefined
  }
}
