/** A capture of the small model, prompt.safetensors in the working folder. */
import { type Tensor, writeSafetensors } from '../../../lib/index.js'
import { keys, layers, outputProjections, queries, values } from './model.js'

const tensors: Record<string, Tensor> = {}
for (let l = 0; l < layers; l++) {
  tensors[`layers.${l}.keys`] = keys[l]!
  tensors[`layers.${l}.values`] = values[l]!
  tensors[`layers.${l}.queries`] = queries[l]!
  tensors[`layers.${l}.output_projection`] = outputProjections[l]!
}
await writeSafetensors('prompt.safetensors', tensors, { 'laprox.capture': '1', model: 'small' })
