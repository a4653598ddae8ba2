import { type LanguageModel, lastLogits } from './language-model.js'
import type { Past } from './past.js'
import { floats } from './rows.js'

/** Where a model goes on from: what it has read, the logits after it, and the position of the next token. */
export interface Start {
  readonly past: Past
  /** [vocabulary] */
  readonly logits: Float32Array
  readonly position: number
}

/** The `count` tokens that the model writes, the most likely one at each step. */
export async function greedy(model: LanguageModel, { past, logits, position }: Start, count: number): Promise<number[]> {
  const tokens = [likeliest(logits)]
  while (tokens.length < count) {
    const reading = await model.extend(past, tokens.slice(-1), position++)
    past = past.append(reading.keys, reading.values)
    tokens.push(likeliest(lastLogits(reading)))
  }
  return tokens
}

/**
 * The mean loss (nats) of predicting each of `tokens` from those before it, all read in one call. The first is not among the
 * predicted: it follows from the logits of `start`, which no eviction has touched.
 */
export async function nextTokenLoss(model: LanguageModel, { past, position }: Start, tokens: readonly number[]): Promise<number> {
  const { logits } = await model.extend(past, tokens, position)
  const [data, vocabulary] = [floats(logits), logits.dims[1]!]
  const losses = tokens.slice(1).map((next, i) => loss(data.subarray(i * vocabulary, (i + 1) * vocabulary), next))
  return losses.reduce((sum, nats) => sum + nats, 0) / losses.length
}

function likeliest(logits: Float32Array): number {
  return logits.reduce((best, logit, token) => (logit > logits[best]! ? token : best), 0)
}

/** The cross-entropy of `token`, in nats. */
function loss(logits: Float32Array, token: number): number {
  const most = logits[likeliest(logits)]!
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - most), 0)
  return Math.log(sum) + most - logits[token]!
}
