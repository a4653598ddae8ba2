import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Device, readSafetensors } from 'laprox'
import type { Layer } from '#lib/cli/synthetic'
import { LanguageModel } from '#lib/evaluation/language-model'
import { readTasks } from '#lib/evaluation/tasks'

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
    using device = await Device.open('cpu')
    const tasks = await readTasks(join(folder, 'tasks.safetensors'))
    for (const { name, prompts: all } of tasks.slice(0, prompts)) {
      const { past, queries } = await this.model.prefill(all[0]!.ids, window)
      using cache = past.cache(device)
      const layers = this.projections.map((projection, i) => ({ queries: queries[i]!, keys: cache.keys(i), values: cache.values(i), projection }))
      yield { task: name, layers }
    }
  }
}

const folder = fileURLToPath(new URL('../examples/needle/model', import.meta.url))
