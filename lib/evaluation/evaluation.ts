import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { integer } from '../check.js'
import type { Contender } from './contenders.js'
import type { Figure, Outcome, Place } from './experiment.js'
import { measureAll } from './jobs.js'
import { Journal } from './journal.js'
import { readSetup, type Setup } from './setup.js'
import { readTasks, type Task } from './tasks.js'

/** What {@link evaluate} takes. */
export interface EvaluateOptions {
  /** A model's folder: `examples/needle/model` says what it holds. */
  readonly folder: string
  readonly contenders: readonly Contender[]
  /** At most so many prompts of each task, the first ones. Default: all. */
  readonly prompts?: number | undefined
  /** Processes, of one thread each. Default: one a core. */
  readonly jobs?: number | undefined
  /** A file for what has been measured so far: a run that finds the journal of a run alike goes on where that one ended. */
  readonly journal?: string | undefined
  readonly signal?: AbortSignal | undefined
  /** Called with the prompts that this run has measured, and will measure in all. */
  readonly progress?: ((done: number, total: number) => void) | undefined
}

/** A finished evaluation: plain data. Figures are in the order of the prompts; null where a policy's budget is below what it protects. */
export interface Evaluation {
  readonly setup: Setup
  /** ISO 8601, when it was finished. */
  readonly date: string
  /** One entry a task: with the whole cache. */
  readonly tasks: readonly { readonly name: string; readonly judgedBy: Task['judgedBy']; readonly full: readonly number[] }[]
  /** With what each policy leaves, figures by the names of the tasks. */
  readonly contenders: readonly (Contender & { readonly figures: Readonly<Record<string, readonly Figure[]>> })[]
}

/**
 * Lets a language model answer prompts from its full cache, and from what each policy leaves of it.
 *
 * @throws LaproxError (as a rejection) `IO`, `BAD_FILE` for the model's files and the journal, `INVALID_ARGUMENT` for a journal of
 *   another run, `ABORTED`; what has been measured stays in the journal
 */
export async function evaluate(options: EvaluateOptions): Promise<Evaluation> {
  const { folder, contenders, signal, progress } = options
  const jobs = integer(options.jobs ?? availableParallelism(), 'jobs', 1)
  const most = options.prompts === undefined ? undefined : integer(options.prompts, 'prompts', 1)
  const setup = await readSetup(folder)
  const tasks = (await readTasks(join(folder, 'tasks.safetensors'))).map((task) => ({ ...task, prompts: task.prompts.slice(0, most) }))
  const places = tasks.flatMap(({ name, prompts }) => prompts.map((_, prompt): Place => ({ task: name, prompt })))

  const subject = { ...setup, prompts: tasks.map(({ name, prompts }) => [name, prompts.length]), contenders }
  const journal = options.journal === undefined ? undefined : Journal.open<Outcome>(options.journal, subject)
  const outcomes = new Map((journal?.entries ?? []).map((outcome) => [key(outcome), outcome]))
  const left = places.filter((place) => !outcomes.has(key(place)))
  let done = 0
  progress?.(done, left.length)
  const policies = contenders.map(({ policy }) => policy)
  const measured = (outcome: Outcome): void => {
    journal?.add(outcome)
    outcomes.set(key(outcome), outcome)
    progress?.(++done, left.length)
  }
  await measureAll({ folder, policies, places: left, jobs, signal, measured })

  const of = ({ name, prompts }: Task): Outcome[] => prompts.map((_, prompt) => outcomes.get(key({ task: name, prompt }))!)
  return {
    setup,
    date: new Date().toISOString(),
    tasks: tasks.map((task) => ({ name: task.name, judgedBy: task.judgedBy, full: of(task).map(({ full }) => full) })),
    contenders: contenders.map((contender, i) => ({
      ...contender,
      figures: Object.fromEntries(tasks.map((task) => [task.name, of(task).map(({ figures }) => figures[i]!)])),
    })),
  }
}

function key({ task, prompt }: Place): string {
  return `${task} ${prompt}`
}
