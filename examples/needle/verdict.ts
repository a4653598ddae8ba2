import { greedy, nextTokenLoss, type Start } from './decoding.js'
import type { LanguageModel } from './language-model.js'
import type { Prompt, Task } from './tasks.js'

/** How a model did on one prompt. */
export interface Verdict {
  /** The tokens it wrote; none where it is judged by its loss. */
  readonly answer: readonly number[]
  /** 1 where the whole answer is right, else 0; for a text the next-token loss in nats. */
  readonly figure: number
  /** The time of answering. */
  readonly ms: number
}

/** Lets the model go on from `start`, and compares with what the prompt's author wrote. */
export async function judge(model: LanguageModel, start: Start, task: Task, prompt: Prompt): Promise<Verdict> {
  const begun = performance.now()
  if (task.judgedBy === 'loss') {
    const figure = await nextTokenLoss(model, start, prompt.answer)
    return { answer: [], figure, ms: performance.now() - begun }
  }
  const answer = await greedy(model, start, prompt.answer.length)
  const right = answer.every((token, i) => token === prompt.answer[i])
  return { answer, figure: Number(right), ms: performance.now() - begun }
}
