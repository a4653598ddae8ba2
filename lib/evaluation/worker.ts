// One process of an evaluation, which `jobs.ts` starts: takes a setup, then one place after another.
import { Experiment, type Place } from './experiment.js'
import type { Reply, WorkerSetup } from './jobs.js'

// The parent decides what a signal of the terminal means.
process.on('SIGINT', () => {})
process.on('disconnect', () => process.exit())

const reply = (message: Reply): void => void process.send!(message)

process.once('message', async ({ folder, policies }: WorkerSetup) => {
  try {
    const experiment = await Experiment.open(folder, policies)
    process.on('message', (place: Place) => {
      experiment.measure(place).then((outcome) => reply({ outcome }), fail)
    })
    reply({ ready: true })
  } catch (error) {
    fail(error)
  }
})

function fail(error: unknown): void {
  const { message, code } = error as { message: string; code?: string }
  reply({ failure: { message, code } })
}
