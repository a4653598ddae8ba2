import type { PaddedPast } from 'laprox/onnxruntime'
import { type LanguageModel, lastLogits, likeliest } from '#lib/evaluation/language-model'

/**
 * The `count` tokens that a model writes, the most likely one at each step. All but the last are appended to the past.
 *
 * @param logits those of the first token
 */
export async function greedy(model: LanguageModel, past: PaddedPast, logits: Float32Array, count: number): Promise<number[]> {
  const tokens = [likeliest(logits)]
  while (tokens.length < count) {
    const outputs = await model.extend(past, tokens.slice(-1))
    past.append(outputs)
    tokens.push(likeliest(lastLogits(outputs)))
  }
  return tokens
}
