import type { PaddedPast } from '../onnxruntime.js'
import { type LanguageModel, likeliest } from './language-model.js'

/** How a model predicts tokens, each from those before it. */
export interface Prediction {
  /** The mean loss in nats. */
  readonly loss: number
  /** Whether each is the most likely token: greedy decoding would write exactly them. */
  readonly greedy: boolean
}

/**
 * Lets a model predict tokens after a past, all read in one call. The first of them is not among the predicted: it follows from
 * the logits of whatever was read before.
 */
export async function predict(model: LanguageModel, past: PaddedPast, tokens: readonly number[]): Promise<Prediction> {
  const { logits } = await model.extend(past, tokens)
  const [data, vocabulary] = [logits!.data as Float32Array, logits!.dims[1]!]
  let [sum, greedy] = [0, true]
  for (let i = 1; i < tokens.length; i++) {
    const row = data.subarray((i - 1) * vocabulary, i * vocabulary)
    const best = likeliest(row)
    sum += crossEntropy(row, tokens[i]!, row[best]!)
    greedy &&= best === tokens[i]
  }
  return { loss: sum / (tokens.length - 1), greedy }
}

/** The cross-entropy of `token` in nats; `most` is the largest of the logits. */
function crossEntropy(logits: Float32Array, token: number, most: number): number {
  let sum = 0
  for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i]! - most)
  return Math.log(sum) + most - logits[token]!
}
