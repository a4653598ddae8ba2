import type { KvCache } from 'laprox'
import { PaddedPast } from 'laprox/onnxruntime'
import type { LanguageModel } from '#lib/evaluation/language-model'
import { predict } from '#lib/evaluation/prediction'
import type { Prompt, Task } from '#lib/evaluation/tasks'
import { greedy } from './decoding.js'

/** How a model did on one prompt. */
export interface Verdict {
  /** The tokens it wrote; none where it is judged by its loss. */
  readonly answer: readonly number[]
  /** 1 where the whole answer is right, else 0; for a text the next-token loss in nats. */
  readonly figure: number
  /** The time of answering. */
  readonly ms: number
}

/**
 * Lets the model go on from what a cache holds of a prompt, and compares with what the prompt's author wrote.
 *
 * @param cache float32, of one sequence; the answer's tokens stand where they always would, after the tokens that it has read
 * @param logits those that follow the prompt's last token: the answer's first token is theirs, whatever the cache holds
 */
export async function judge(model: LanguageModel, cache: KvCache, logits: Float32Array, task: Task, prompt: Prompt): Promise<Verdict> {
  const begun = performance.now()
  const past = PaddedPast.from(cache, { room: task.judgedBy === 'loss' ? 0 : prompt.answer.length })
  if (task.judgedBy === 'loss') {
    const { loss } = await predict(model, past, prompt.answer)
    return { answer: [], figure: loss, ms: performance.now() - begun }
  }
  const answer = await greedy(model, past, logits, prompt.answer.length)
  const right = answer.every((token, i) => token === prompt.answer[i])
  return { answer, figure: Number(right), ms: performance.now() - begun }
}
