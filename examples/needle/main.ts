import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Device, LaproxError } from 'laprox'
import { Progress } from '#lib/cli/progress'
import { openAttentionModel } from '#lib/evaluation/attention-model'
import { LanguageModel } from '#lib/evaluation/language-model'
import { readTasks, type Task } from '#lib/evaluation/tasks'
import { compare } from './comparison.js'
import { help, type Options, readOptions, UsageError } from './options.js'
import { writePage } from './page.js'
import { showComparison } from './screen.js'
import { Summary } from './summary.js'
import { Text } from './text.js'

/** Of each task, this many prompts are shown with their answers; the others go into the figures alone. */
const SHOWN = 2

async function run({ contenders, prompts, json, report, model }: Options): Promise<void> {
  const { text, language, ...all } = await load(model)
  const tasks = all.tasks.map((task) => firstPrompts(task, prompts))
  using device = await Device.open('cpu')
  using attention = await openAttentionModel(device, model, language.shape)

  console.log(`${introduction(language, tasks, device)}\n`)
  const progress = new Progress(tasks.length * prompts)
  const summary = new Summary(tasks, contenders)
  let page = report
  for await (const comparison of compare(language, attention, tasks, contenders, (done, what) => progress.update(done, what))) {
    if (page !== undefined) await writePage(page, attention, comparison, text)
    page = undefined // the first prompt has it
    summary.add(comparison)
    if (comparison.index < SHOWN) {
      progress.clear()
      console.log(`${showComparison(comparison, text)}\n`)
    }
  }
  progress.clear()
  console.log(`${summary}`)
  if (json !== undefined) await writeFile(json, `${JSON.stringify(summary, undefined, 2)}\n`)
}

async function load(folder: string): Promise<{ tasks: Task[]; text: Text; language: LanguageModel }> {
  try {
    const tasks = await readTasks(join(folder, 'tasks.safetensors'))
    return { tasks, text: await Text.load(folder), language: await LanguageModel.load(folder) }
  } catch (error) {
    throw new UsageError(`--model ${folder} cannot be used: ${(error as Error).message}`, { cause: error })
  }
}

function introduction({ shape }: LanguageModel, tasks: readonly Task[], device: Device): string {
  const prompts = tasks.reduce((sum, task) => sum + task.prompts.length, 0)
  const { threads, instructionSet } = device.info()
  return [
    `A decoder of ${shape.layers} layers, ${shape.queryHeads} query heads and ${shape.kvHeads} KV heads of ${shape.headDim} dimensions reads ${prompts} prompts.`,
    `It answers each from its full KV cache, and from what is left after an eviction by laprox (CPU, ${threads} threads, ${instructionSet}).`,
  ].join('\n')
}

function firstPrompts(task: Task, count: number): Task {
  const available = task.prompts.length
  if (count > available) throw new UsageError(`--prompts ${count}: the model's folder holds ${available} of '${task.name}'`)
  return { ...task, prompts: task.prompts.slice(0, count) }
}

try {
  const options = readOptions(process.argv.slice(2))
  if (options === undefined) console.log(help)
  else await run(options)
} catch (error) {
  if (error instanceof UsageError) {
    console.error(`${error.message}\nnpm run demo -- --help says what there is.`)
    process.exitCode = 2
  } else if (error instanceof LaproxError) {
    console.error(`${error.name} ${error.code}: ${error.message}`)
    process.exitCode = 1
  } else {
    throw error
  }
}
