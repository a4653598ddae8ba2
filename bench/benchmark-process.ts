import { benchmarks } from './benchmarks.js'
import type { Settings } from './measurement.js'

// Measures one benchmark, in a process of its own: what another has left to the garbage collector would be collected during this one.

/** What main.ts asks for; it is sent one Measurement after another. */
export interface BenchmarkJob extends Settings {
  readonly name: string
}

process.once('message', async ({ name, ...settings }: BenchmarkJob) => {
  const measure = await benchmarks[name]!()
  for await (const measurement of measure(settings)) process.send!(measurement)
  process.disconnect()
})
