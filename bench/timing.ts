import { Bench } from 'tinybench'
import { type Timing, timing } from '#lib/cli/timing'

/** What is run. Where it gives a number back, that many milliseconds stand for how long it took. */
export type Task = () => Promise<unknown>

/**
 * Times tasks in turn, so that a slow minute of the machine hits all of them: each runs once unseen, then `rounds` times.
 *
 * @returns one timing a task
 */
export async function time<Name extends string>(tasks: Readonly<Record<Name, Task>>, rounds: number): Promise<Record<Name, Timing>> {
  const names = Object.keys(tasks) as Name[]
  const samples = new Map<Name, number[]>(names.map((name) => [name, []]))
  for (let round = 0; round < rounds; round++) {
    const bench = new Bench({ iterations: 1, time: 0, warmup: round === 0, warmupIterations: 1, warmupTime: 0, retainSamples: true, throws: true })
    for (const name of names) bench.add(name, async () => measured(await tasks[name]()), { async: true })
    for (const task of await bench.run()) {
      const { result } = task
      if (result.state !== 'completed') throw new Error(`${task.name}: ${result.state}`)
      samples.get(task.name as Name)!.push(...result.latency.samples!)
    }
  }
  return Object.fromEntries(names.map((name) => [name, timing(samples.get(name)!)])) as Record<Name, Timing>
}

function measured(result: unknown): unknown {
  return typeof result === 'number' ? { overriddenDuration: result } : undefined
}
