import type { Policy } from 'laprox'
import { bytes, percent, signed, table } from '#lib/cli/table'
import type { Task } from '#lib/evaluation/tasks'
import type { Comparison } from './comparison.js'
import { Means } from './means.js'
import type { Contender } from './options.js'

/** What an eviction took and left. */
type Cost = 'keptEntries' | 'totalEntries' | 'bytesBefore' | 'bytesAfter' | 'msScore' | 'msSelect' | 'msCompact' | 'msAnswer'

/** Gathers comparisons into the figures of each policy: of each task the share right (of a text the rise of the loss), and means a prompt. */
export class Summary {
  readonly #full = new Means()
  readonly #figures: ReadonlyMap<Policy, Means>
  readonly #costs: ReadonlyMap<Policy, Means<Cost>>

  constructor(
    private readonly tasks: readonly Task[],
    private readonly contenders: readonly Contender[],
  ) {
    this.#figures = new Map(contenders.map(({ policy }) => [policy, new Means()]))
    this.#costs = new Map(contenders.map(({ policy }) => [policy, new Means<Cost>()]))
  }

  add({ task, full, trials, msPrefill }: Comparison): void {
    const byLoss = task.judgedBy === 'loss'
    this.#full.add({ [byLoss ? `${task.name}Loss` : task.name]: full.figure, msPrefill, msAnswer: full.ms })
    for (const { policy, verdict, report } of trials) {
      const figure = byLoss ? { [`${task.name}LossRise`]: verdict.figure - full.figure } : { [task.name]: verdict.figure }
      this.#figures.get(policy)!.add(figure)
      this.#costs.get(policy)!.add({
        keptEntries: report.kept,
        totalEntries: report.entries,
        bytesBefore: report.bytesBefore,
        bytesAfter: report.bytesAfter,
        msScore: report.msScore,
        msSelect: report.msSelect,
        msCompact: report.msCompact,
        msAnswer: verdict.ms,
      })
    }
  }

  /** What `--json` writes. */
  toJSON(): object {
    return {
      prompts: this.tasks[0]!.prompts.length,
      full: this.#full.values(),
      results: this.#results().map(({ policy, keep, figures, costs }) => ({ policy: policy.name, keep, ...figures, ...costs })),
    }
  }

  toString(): string {
    const results = this.#results()
    const full = this.#full.values()
    const titles = this.tasks.map(({ name, judgedBy }) => (judgedBy === 'loss' ? `${name} loss` : name))
    const ms = (value: number) => value.toFixed(1)
    return table([
      ['', ...titles, 'cache', 'score ms', 'select ms', 'compact ms', 'answer ms'],
      [
        'full cache',
        ...this.tasks.map(({ name, judgedBy }) => (judgedBy === 'loss' ? full[`${name}Loss`]!.toFixed(3) : percent(full[name]!))),
        bytes(results[0]!.costs.bytesBefore),
        ...['', '', ''],
        ms(full.msAnswer!),
      ],
      ...results.map(({ policy, keep, figures, costs }) => [
        `${policy.name} ${percent(keep)}`,
        ...this.tasks.map(({ name, judgedBy }) => (judgedBy === 'loss' ? signed(figures[`${name}LossRise`]!) : percent(figures[name]!))),
        bytes(costs.bytesAfter),
        ...[costs.msScore, costs.msSelect, costs.msCompact, costs.msAnswer].map(ms),
      ]),
    ])
  }

  #results() {
    return this.contenders.map(({ policy, keep }) => ({
      policy,
      keep,
      figures: this.#figures.get(policy)!.values(),
      costs: this.#costs.get(policy)!.values(),
    }))
  }
}
