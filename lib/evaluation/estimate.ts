import type { Evaluation } from './evaluation.js'

/** What prompts tell of a policy, and how far off it may be. */
export interface Estimate {
  /** The share of answers that are right, or the mean rise of the next-token loss over the full cache's, in nats. */
  readonly value: number
  /** Its standard error: of a share the binomial one, of a rise that of the differences, prompt by prompt. */
  readonly error: number
}

/**
 * What an evaluation says of a contender in a task.
 *
 * @param prompts look at the first so many. Default: all
 * @returns undefined where its budget was too small for a prompt
 */
export function estimate({ tasks }: Evaluation, { figures }: Evaluation['contenders'][number], task: string, prompts?: number): Estimate | undefined {
  const { judgedBy, full } = tasks.find(({ name }) => name === task)!
  const given = figures[task]!.slice(0, prompts)
  if (given.includes(null)) return undefined
  const values = given as number[]
  if (judgedBy === 'answer') {
    const value = mean(values)
    return { value, error: Math.sqrt((value * (1 - value)) / values.length) }
  }
  const rises = values.map((loss, i) => loss - full[i]!)
  const value = mean(rises)
  const squares = rises.reduce((sum, rise) => sum + (rise - value) ** 2, 0)
  return { value, error: Math.sqrt(squares / Math.max(rises.length - 1, 1) / rises.length) }
}

export function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length
}
