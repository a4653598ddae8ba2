import { join } from 'node:path'
import type { KvCache } from '../cache.js'
import { compact } from '../compact.js'
import { Device } from '../device.js'
import { LaproxError } from '../errors.js'
import type { AttentionModel } from '../model.js'
import { PaddedPast } from '../onnxruntime.js'
import type { Policy } from '../policy.js'
import { type Scores, score } from '../score.js'
import { select } from '../selection.js'
import { openAttentionModel } from './attention-model.js'
import { LanguageModel, likeliest } from './language-model.js'
import { predict } from './prediction.js'
import { type Prompt, readTasks, type Task } from './tasks.js'

/** Which prompt: of a task, counted from 0. */
export interface Place {
  readonly task: string
  readonly prompt: number
}

/** How a model did on a prompt; null where a policy's budget is below what it protects of so short a prompt. */
export type Figure = number | null

/**
 * How a model did on one prompt. A figure is 1 where the whole answer is right, else 0; of a text it is the mean next-token loss in
 * nats of all of its tokens but the first.
 */
export interface Outcome extends Place {
  /** With the whole cache. */
  readonly full: number
  /** With what each policy left of it, in the order of the policies. */
  readonly figures: readonly Figure[]
}

/** Reads prompts, and answers each from the full cache and from what every policy leaves of it: on one thread. */
export class Experiment implements AsyncDisposable {
  readonly #language: LanguageModel
  readonly #device: Device
  readonly #attention: AttentionModel
  readonly #tasks: readonly Task[]
  readonly #policies: readonly Policy[]

  private constructor(language: LanguageModel, device: Device, attention: AttentionModel, tasks: readonly Task[], policies: readonly Policy[]) {
    this.#language = language
    this.#device = device
    this.#attention = attention
    this.#tasks = tasks
    this.#policies = policies
  }

  /** @param folder with config.json, extend.onnx, model.safetensors and tasks.safetensors: see `examples/needle/model` */
  static async open(folder: string, policies: readonly Policy[]): Promise<Experiment> {
    const tasks = await readTasks(join(folder, 'tasks.safetensors'))
    const language = await LanguageModel.load(folder, 1)
    const device = await Device.open('cpu', { threads: 1 })
    return new Experiment(language, device, await openAttentionModel(device, folder, language.shape), tasks, policies)
  }

  /**
   * Measures one prompt. It is read once, its last token too, with nothing evicted; what is written after it sees only what is left.
   * Policies of one score rule and window rank the same scores, which are computed once.
   */
  async measure({ task: name, prompt: index }: Place): Promise<Outcome> {
    const task = this.#tasks.find((one) => one.name === name)
    const prompt = task?.prompts[index]
    if (task === undefined || prompt === undefined) throw new LaproxError('INVALID_ARGUMENT', `there is no prompt ${index} of a task '${name}'`)
    const window = Math.max(...this.#policies.map((policy) => policy.window))
    const { past, logits, queries } = await this.#language.prefill(prompt.ids, window)
    using cache = past.cache(this.#device)
    const full = await this.#judge(task, prompt, logits, cache)

    const scores = new Map<string, Scores>()
    const scoresOf = async (policy: Policy): Promise<Scores> => {
      const rule = JSON.stringify([policy.score, policy.window, policy.layerWeights])
      const known = scores.get(rule) ?? (await score(this.#attention, cache, { queries }, policy))
      scores.set(rule, known)
      return known
    }
    const figures: Figure[] = []
    for (const policy of this.#policies) {
      const selection = await select(await scoresOf(policy), policy, { device: this.#device }).catch(unlessTooSmall)
      if (selection === undefined) {
        figures.push(null)
        continue
      }
      using kept = await compact(cache, selection)
      figures.push(await this.#judge(task, prompt, logits, kept))
    }
    return { task: name, prompt: index, full, figures }
  }

  /** The figure of one answer. Its first token follows from the logits of the prompt, which no eviction has touched. */
  async #judge({ judgedBy }: Task, { answer }: Prompt, logits: Float32Array, cache: KvCache): Promise<number> {
    const { loss, greedy } = await predict(this.#language, PaddedPast.from(cache), answer)
    return judgedBy === 'loss' ? Number(loss.toFixed(6)) : Number(greedy && likeliest(logits) === answer[0])
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#attention.dispose()
    this.#device.dispose()
    await this.#language.release()
  }
}

function unlessTooSmall(error: unknown): undefined {
  if (!(error instanceof LaproxError) || error.code !== 'BUDGET_TOO_SMALL') throw error
}
