import { existsSync } from 'node:fs'
import { rm, writeFile } from 'node:fs/promises'
import { Command } from 'commander'
import { LaproxError } from '../errors.js'
import { allContenders, quickContenders } from '../evaluation/contenders.js'
import { estimate, mean } from '../evaluation/estimate.js'
import type { Evaluation } from '../evaluation/evaluation.js'
import { checkReplaceable, replaceFile } from '../file.js'
import { readCount } from './options.js'
import { Progress } from './progress.js'
import { percent, signed, table } from './table.js'
import type { Terminal } from './terminal.js'

interface Options {
  readonly model: string
  readonly json: string
  readonly jobs?: number
  readonly quick?: boolean
}

/** Of each task, in a quick look. */
const quickPrompts = 12

export function evalCommand(terminal: Terminal): Command {
  return new Command('eval')
    .description(
      'lets a language model answer prompts from what each policy leaves of its cache, and counts what is right; goes on where it was when it is started again',
    )
    .requiredOption('--model <dir>', "the model's folder: config.json, extend.onnx, model.safetensors, tasks.safetensors")
    .option('--json <file>', 'where the results go; while it runs, what it has measured is beside it, in <file>l', 'evaluation.json')
    .option('--jobs <n>', 'processes, of one thread each (default: one a core)', readCount)
    .option('--quick', `six policies, two shares and ${quickPrompts} prompts a task`)
    .addHelpText('after', '\nExample:\n  laprox eval --model examples/needle/model --quick')
    .action(async (options: Options) => {
      const evaluation = await runEvaluation(options, terminal)
      const note = options.quick ? 'A quick look, at some of the policies, shares and prompts.\n' : ''
      terminal.stdout.write(`${note}${evaluationTable(evaluation)}\n`)
    })
}

/** Evaluates, and writes the results; shows the progress where there is a terminal. */
async function runEvaluation({ model, json, jobs, quick = false }: Options, terminal: Terminal): Promise<Evaluation> {
  const { evaluate } = await import('../evaluation/evaluation.js').catch(explain)
  await checkReplaceable(json)
  // evaluation.json's is evaluation.jsonl.
  const journal = `${json}l`
  const contenders = quick ? quickContenders() : allContenders()
  const prompts = quick ? quickPrompts : undefined
  let bar: Progress | undefined
  const progress = (done: number, total: number): void => {
    bar ??= new Progress(Math.max(total, 1), terminal.stderr)
    bar.update(done, `${done} of ${total} prompts`)
  }
  try {
    const evaluation = await evaluate({ folder: model, contenders, prompts, jobs, journal, signal: terminal.signal, progress })
    await replaceFile(json, (temporary) => writeFile(temporary, toText(evaluation)))
    await rm(journal, { force: true })
    return evaluation
  } finally {
    bar?.clear()
    if (terminal.signal.aborted && existsSync(journal))
      terminal.stderr.write(`What has been measured is in ${journal}: the same command goes on from there.\n`)
  }
}

/** JSON with arrays of numbers on one line. */
function toText(evaluation: Evaluation): string {
  const text = JSON.stringify(evaluation, undefined, 2)
  return `${text.replace(/\[\s+([-\d.,\senul]+?)\s+\]/g, (_, list: string) => `[${list.replace(/\s+/g, ' ')}]`)}\n`
}

/** A line a policy and a column a share: what each task says, separated by strokes. */
function evaluationTable(evaluation: Evaluation): string {
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
    table([['', ...shares.map(percent)], ...rows]),
  ].join('\n')
}

function figure(judgedBy: 'loss' | 'answer', value: number | undefined): string {
  if (value === undefined) return '-'
  return judgedBy === 'loss' ? signed(value) : value.toFixed(2)
}

function explain(error: unknown): never {
  const { code, message } = error as NodeJS.ErrnoException
  if (code !== 'ERR_MODULE_NOT_FOUND' || !message.includes('onnxruntime-node')) throw error
  throw new LaproxError('UNSUPPORTED', 'an evaluation runs its model in onnxruntime-node, which is not installed: npm install onnxruntime-node', {
    cause: error,
  })
}
