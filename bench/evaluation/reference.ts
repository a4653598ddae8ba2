import { readFileSync } from 'node:fs'
import { estimate } from '#lib/evaluation/estimate'
import type { Evaluation } from '#lib/evaluation/evaluation'

/** Figures that somebody else's implementation of the same rules had of the same model. */
interface Reference {
  readonly origin: string
  /** Of each task, the first so many. */
  readonly prompts: number
  readonly rules: readonly {
    readonly rule: string
    /** Who plays by this rule here. */
    readonly contender: string
    /** By the share kept, then by the task: shares right and rises of the loss in nats, to two digits after the point. */
    readonly figures: Readonly<Record<string, Readonly<Record<string, number>>>>
  }[]
}

export const reference: Reference = JSON.parse(readFileSync(new URL('reference.json', import.meta.url), 'utf8'))

/** A figure of the reference, and what the same prompts gave here. */
export interface Comparison {
  readonly rule: string
  readonly contender: string
  readonly keep: number
  readonly task: string
  readonly reference: number
  readonly here: number
  /**
   * `same` to the digits that the reference gives, `noise` where they differ by at most two standard errors of a difference between
   * independent samples (these are the same prompts, so that most of the noise is not even there), else `different`.
   */
  readonly verdict: 'same' | 'noise' | 'different'
}

/** Half of the last digit, and a little for ties. */
const rounding = 0.0055

/** Compares where both have a figure, on the reference's prompts. */
export function compareWithReference(evaluation: Evaluation): Comparison[] {
  const { prompts, rules } = reference
  if (evaluation.tasks.some(({ full }) => full.length < prompts)) return []
  return rules.flatMap(({ rule, contender: name, figures }) =>
    Object.entries(figures).flatMap(([share, byTask]) => {
      const contender = evaluation.contenders.find((one) => one.name === name && one.keep === Number(share))
      if (contender === undefined) return []
      return evaluation.tasks.flatMap(({ name: task, judgedBy }): Comparison[] => {
        const given = byTask[task]
        const found = estimate(evaluation, contender, task, prompts)
        if (given === undefined || found === undefined) return []
        const difference = Math.abs(found.value - given)
        const between = (found.value + given) / 2
        const error = judgedBy === 'answer' ? Math.sqrt((between * (1 - between)) / prompts) : found.error
        const verdict = difference <= rounding ? 'same' : difference <= 2 * Math.SQRT2 * error + rounding ? 'noise' : 'different'
        return [{ rule, contender: name, keep: Number(share), task, reference: given, here: found.value, verdict }]
      })
    }),
  )
}
