import { type ChildProcess, fork } from 'node:child_process'
import { extname } from 'node:path'
import { LaproxError, type LaproxErrorCode, throwIfAborted } from '../errors.js'
import type { Policy } from '../policy.js'
import { Experiment, type Outcome, type Place } from './experiment.js'

/** What a process is told first. */
export interface WorkerSetup {
  readonly folder: string
  readonly policies: readonly Policy[]
}

/** What a process says: that it is there, how a prompt went, or what went wrong. */
export type Reply =
  | { readonly ready: true }
  | { readonly outcome: Outcome }
  | { readonly failure: { readonly message: string; readonly code?: string | undefined } }

/** What {@link measureAll} takes. */
export interface Jobs extends WorkerSetup {
  readonly places: readonly Place[]
  /** Processes at work, one thread each; 1 is this process. */
  readonly jobs: number
  readonly signal?: AbortSignal | undefined
  /** Called as soon as a prompt has been measured, in any order. Its errors end the work. */
  readonly measured: (outcome: Outcome) => void
}

/** Measures prompts, each process on the next one that nobody has begun. Rejects with the first error, `ABORTED` among them. */
export async function measureAll(work: Jobs): Promise<void> {
  const { places, jobs, signal } = work
  throwIfAborted(signal)
  if (places.length === 0) return
  await (jobs === 1 ? measureHere(work) : measureInProcesses(work, Math.min(jobs, places.length)))
}

async function measureHere({ folder, policies, places, signal, measured }: Jobs): Promise<void> {
  const experiment = await Experiment.open(folder, policies)
  try {
    for (const place of places) {
      measured(await experiment.measure(place))
      throwIfAborted(signal)
    }
  } finally {
    await experiment[Symbol.asyncDispose]()
  }
}

async function measureInProcesses({ folder, policies, places, signal, measured }: Jobs, count: number): Promise<void> {
  const waiting = places.values()
  // Beside this file, of its kind: what runs from sources forks sources.
  const worker = new URL(`./worker${extname(import.meta.url)}`, import.meta.url)
  const children: ChildProcess[] = []
  let ended = false
  const run = (): Promise<void> =>
    new Promise((resolve, reject) => {
      const child = fork(worker, { stdio: ['ignore', 'ignore', 'inherit', 'ipc'] })
      children.push(child)
      child.on('error', reject)
      child.on('exit', (code, killer) => {
        const how = killer ?? `code ${code}`
        reject(new LaproxError('INTERNAL', `a process of the evaluation ended by itself (${how}); with fewer jobs it takes less memory`))
      })
      child.on('message', (reply: Reply) => {
        if (ended) return // on its way when the work ended: whoever has been told of the end may be at the journal
        try {
          if ('failure' in reply) throw asError(reply.failure)
          if ('outcome' in reply) measured(reply.outcome)
          const { value: place, done } = waiting.next()
          if (done) resolve()
          else child.send(place)
        } catch (error) {
          reject(error)
        }
      })
      child.send({ folder, policies } satisfies WorkerSetup)
    })
  const aborted = new Promise<never>((_, reject) => {
    signal?.addEventListener('abort', () => reject(new LaproxError('ABORTED', 'the evaluation was aborted', { cause: signal.reason })), {
      once: true,
    })
  })
  try {
    await Promise.race([Promise.all(Array.from({ length: count }, run)), aborted])
  } finally {
    ended = true
    for (const child of children) child.kill('SIGTERM')
  }
}

function asError({ message, code }: { message: string; code?: string | undefined }): Error {
  return code === undefined ? new Error(message) : new LaproxError(code as LaproxErrorCode, message)
}
