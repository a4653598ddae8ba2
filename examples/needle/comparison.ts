import { type AttentionModel, type EvictReport, evict, type KvCache, type Selection, type Window } from 'laprox'
import type { LanguageModel } from '#lib/evaluation/language-model'
import type { Prompt, Task } from '#lib/evaluation/tasks'
import type { Contender } from './options.js'
import { judge, type Verdict } from './verdict.js'

/** What a policy made of a prompt's cache, and how the model did with the rest. */
export interface Trial extends Contender {
  readonly verdict: Verdict
  readonly selection: Selection
  readonly report: EvictReport
}

/** One prompt: read once, answered from the full cache and from what each policy left of it. */
export interface Comparison {
  readonly task: Task
  readonly prompt: Prompt
  /** Counts from 0 in its task. */
  readonly index: number
  readonly msPrefill: number
  /** All of the prompt, until the next comparison is made. */
  readonly cache: KvCache
  readonly window: Window
  readonly full: Verdict
  readonly trials: readonly Trial[]
}

/** Compares on every prompt of every task, one after the other. */
export async function* compare(
  language: LanguageModel,
  attention: AttentionModel,
  tasks: readonly Task[],
  contenders: readonly Contender[],
  progress: (prompts: number, what: string) => void,
): AsyncGenerator<Comparison> {
  const window = Math.max(...contenders.map(({ policy }) => policy.window))
  let prompts = 0
  for (const task of tasks) {
    for (const [index, prompt] of task.prompts.entries()) {
      const what = `${task.name} ${index + 1} of ${task.prompts.length}`
      const begun = performance.now()
      const { past, queries, logits } = await language.prefill(prompt.ids, window, (read) => progress(prompts + 0.9 * read, what))
      const msPrefill = performance.now() - begun
      // The prompt's last token has been read with the full cache: the answer's first token follows from its logits. Eviction
      // comes after it, and every further token sees only what is left. New tokens stand where they always would.
      using cache = past.cache(attention.device)
      const full = await judge(language, cache, logits, task, prompt)
      const trials: Trial[] = []
      for (const contender of contenders) {
        const { cache: kept, selection, report } = await evict(attention, cache, { queries }, contender.policy)
        const verdict = await judge(language, kept, logits, task, prompt)
        kept.dispose()
        trials.push({ ...contender, verdict, selection, report })
      }
      progress(++prompts, what)
      yield { task, prompt, index, msPrefill, cache, window: { queries }, full, trials }
    }
  }
}
