import { readFileSync } from 'node:fs'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setTimeout } from 'node:timers/promises'
import { Device, policies, score } from 'laprox'
import { generateLayer } from '#lib/cli/synthetic'
import { describe, llamaShape } from './layer.js'
import { goal, type Measurement, type Settings } from './measurement.js'
import { time } from './timing.js'

/** How long the event loop keeps a timer waiting while a scoring of seconds runs on every core. */
export async function* eventLoop({ quick, threads }: Settings): AsyncGenerator<Measurement> {
  using device = await Device.open('cpu', { threads })
  const layers = quick ? 4 : 8
  const layer = generateLayer(llamaShape(quick ? 4096 : 32768))
  const { model, cache, window } = await describe(device, Array(layers).fill(layer))
  const policy = policies.laprox({ keep: 0.05 })
  const delays: number[] = []
  const before = stolenTime()
  const { scoring } = await time(
    {
      scoring: async () => {
        delays.push(await longestDelay(() => score(model, cache, window, policy, { progress: () => {} })))
      },
    },
    quick ? 1 : 11,
  )
  const stolen = stolenTime() - before
  const idle = await longestDelay(() => setTimeout(scoring.msMedian))
  const longest = Float64Array.from(delays).sort()[delays.length >> 1]!
  yield {
    benchmark: 'event-loop',
    name: 'every exact joint score of several layers',
    parameters: { layers, kvHeads: cache.kvHeads, tokens: cache.lengths(0)[0]!, threads },
    ...scoring,
    figures: { msLongestDelay: longest, msLongestDelayOfAll: Math.max(...delays), msLongestDelayIdle: idle, msStolen: stolen },
    goals: [goal('longest delay of the event loop', longest, 'below', 10, 'ms')],
    note:
      'how late a timer of 1 ms was at most while a scoring ran, by perf_hooks.monitorEventLoopDelay: the median of the runs, and the longest delay of all of them, one run unseen included; ' +
      'idle: without any work, over the time of one run; stolen: what others on the host of this virtual machine took of its processors meanwhile',
  }
}

/** Milliseconds between two ticks of the timer that is watched. */
const period = 1

/** Milliseconds. The monitor records the time from tick to tick, of which the period is no delay: a loop that is never late has samples of 1 ms. */
async function longestDelay(work: () => Promise<unknown>): Promise<number> {
  const delay = monitorEventLoopDelay({ resolution: period })
  delay.enable()
  await work()
  delay.disable()
  return delay.max / 1e6 - period
}

/** Milliseconds that a hypervisor gave to others, of all processors; 0 where the system does not tell. */
function stolenTime(): number {
  try {
    const [, , , , , , , , ticks] = readFileSync('/proc/stat', 'utf8').split(/\s+/, 9)
    return Number(ticks) * 10
  } catch {
    return 0
  }
}
