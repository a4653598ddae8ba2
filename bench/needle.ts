import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { readSafetensors, Tensor } from 'laprox'
import type * as onnx from 'onnxruntime-node'
import type { Layer } from '#lib/cli/synthetic'
import { LanguageModel } from '../examples/needle/language-model.js'
import { readTasks } from '../examples/needle/tasks.js'

/** The real caches of a small language model, after prompts of about 4,090 tokens: the demo's model and its tasks. */
export class Needle {
  private constructor(
    private readonly model: LanguageModel,
    private readonly projections: readonly Layer['projection'][],
  ) {}

  static async load(): Promise<Needle> {
    const model = await LanguageModel.load(folder)
    const names = Array.from({ length: model.shape.layers }, (_, layer) => `model.layers.${layer}.self_attn.o_proj.weight`)
    const { tensors } = await readSafetensors(join(folder, 'model.safetensors'), { names })
    return new Needle(
      model,
      names.map((name) => tensors.get(name) as Layer['projection']),
    )
  }

  /** The first prompts, one a task: what the model's layers hold of each when it has been read. */
  async *caches(prompts: number, window: number): AsyncGenerator<{ task: string; layers: Layer[] }> {
    const tasks = await readTasks(join(folder, 'tasks.safetensors'))
    for (const { name, prompts: all } of tasks.slice(0, prompts)) {
      const { past, queries } = await this.model.prefill(all[0]!.ids, window)
      const layers = past.layers.map(({ key, value }, i) => ({
        queries: view(queries[i]!),
        keys: view(key),
        values: view(value),
        projection: this.projections[i]!,
      }))
      yield { task: name, layers }
    }
  }
}

const folder = fileURLToPath(new URL('../examples/needle/model', import.meta.url))

function view(tensor: onnx.Tensor): Tensor<'float32'> {
  return new Tensor('float32', tensor.data as Float32Array, tensor.dims)
}
