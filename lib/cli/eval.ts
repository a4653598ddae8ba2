import { rm, writeFile } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { extname } from 'node:path'
import { Command, InvalidArgumentError } from 'commander'
import { LaproxError } from '../errors.js'
import { allContenders, quickContenders } from '../evaluation/contenders.js'
import { estimate, mean } from '../evaluation/estimate.js'
import type { Evaluation } from '../evaluation/evaluation.js'
import { checkReplaceable, replaceFile } from '../file.js'
import { Progress } from './progress.js'
import { percent, signed, table } from './table.js'

export interface EvalOptions {
  readonly model: string
  readonly json: string
  readonly jobs: number
  readonly quick: boolean
}

/** Of each task, in a quick look. */
const quickPrompts = 12

export function evalCommand(): Command {
  return new Command('eval')
    .summary('let a language model answer from what each policy leaves of its cache')
    .description(
      'Reads prompts with a language model in ONNX Runtime, evicts with every policy, and counts what the model still answers right.\n' +
        'A run that was stopped goes on where it was when it is started again.',
    )
    .requiredOption('--model <dir>', "the model's folder: config.json, extend.onnx, model.safetensors, tasks.safetensors")
    .option('--json <file>', 'where the results go; beside it, as .jsonl, what a running evaluation has measured', 'evaluation.json')
    .option('--jobs <n>', 'processes, of one thread each', count, availableParallelism())
    .option('--quick', 'six policies, two shares and twelve prompts a task', false)
    .addHelpText('after', '\nExample:\n  $ npx laprox eval --model examples/needle/model --quick')
    .action(async (options: EvalOptions) => {
      const evaluation = await runEvaluation(options)
      if (evaluation !== undefined) console.log(evaluationTable(evaluation))
    })
}

/**
 * Evaluates, and writes the results.
 *
 * @returns undefined where it was interrupted; the process's exit code says so
 */
export async function runEvaluation({ model, json, jobs, quick }: EvalOptions): Promise<Evaluation | undefined> {
  const { evaluate } = await import('../evaluation/evaluation.js').catch(explain)
  await checkReplaceable(json)
  const journal = `${json.slice(0, json.length - extname(json).length)}.jsonl`
  const interrupt = new AbortController()
  const end = (): void => interrupt.abort()
  process.once('SIGINT', end)
  let progress: Progress | undefined
  try {
    const evaluation = await evaluate({
      folder: model,
      contenders: quick ? quickContenders() : allContenders(),
      ...(quick ? { prompts: quickPrompts } : {}),
      jobs,
      journal,
      signal: interrupt.signal,
      progress(done, total) {
        progress ??= new Progress(Math.max(total, 1))
        progress.update(done, `${done} of ${total} prompts`)
      },
    })
    progress?.clear()
    await replaceFile(json, (temporary) => writeFile(temporary, toText(evaluation)))
    await rm(journal, { force: true })
    return evaluation
  } catch (error) {
    progress?.clear()
    if (!interrupt.signal.aborted) throw error
    console.error(`Stopped. What has been measured is in ${journal}: the same command goes on from there.`)
    process.exitCode = 130
    return undefined
  } finally {
    process.off('SIGINT', end)
  }
}

/** JSON with arrays of numbers on one line. */
function toText(evaluation: Evaluation): string {
  const text = JSON.stringify(evaluation, undefined, 2)
  return `${text.replace(/\[\s+([-\d.,\senul]+?)\s+\]/g, (_, list: string) => `[${list.replace(/\s+/g, ' ')}]`)}\n`
}

/** A line a policy and a column a share: what each task says, separated by strokes. */
export function evaluationTable(evaluation: Evaluation): string {
  const { tasks, contenders } = evaluation
  const shares = [...new Set(contenders.map(({ keep }) => keep))].sort((a, b) => a - b)
  const names = [...new Set(contenders.map(({ name }) => name))]
  const full = tasks.map(({ judgedBy, full }) => (judgedBy === 'loss' ? `${mean(full).toFixed(3)} nats` : mean(full).toFixed(2)))
  const cell = (name: string, keep: number): string => {
    const contender = contenders.find((one) => one.name === name && one.keep === keep)
    if (contender === undefined) return ''
    return tasks.map((task) => figure(task.judgedBy, estimate(evaluation, contender, task.name)?.value)).join(' / ')
  }
  const rows = names.map((name) => [name, ...shares.map((keep) => cell(name, keep))])
  return [
    `${tasks[0]!.full.length} prompts a task: ${tasks.map(({ name, judgedBy }) => (judgedBy === 'loss' ? `rise of the loss on ${name}` : `${name} right`)).join(' / ')}`,
    `full cache: ${full.join(' / ')}`,
    '',
    table([['kept', ...shares.map(percent)], ...rows]),
  ].join('\n')
}

function figure(judgedBy: 'loss' | 'answer', value: number | undefined): string {
  if (value === undefined) return '-'
  return judgedBy === 'loss' ? signed(value) : value.toFixed(2)
}

function count(text: string): number {
  const value = Number(text)
  if (Number.isInteger(value) && value > 0) return value
  throw new InvalidArgumentError('expected an integer of at least 1')
}

function explain(error: unknown): never {
  const { code, message } = error as NodeJS.ErrnoException
  if (code !== 'ERR_MODULE_NOT_FOUND' || !message.includes('onnxruntime-node')) throw error
  throw new LaproxError('UNSUPPORTED', 'an evaluation runs its model in onnxruntime-node, which is not installed: npm install onnxruntime-node', {
    cause: error,
  })
}
