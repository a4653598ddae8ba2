import { existsSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type ParseArgsConfig, parseArgs } from 'node:util'
import { InvalidArgumentError } from 'commander'
import { LaproxError, type Policy, policy, presetNames } from 'laprox'
import { readCount, readShare } from '#lib/cli/options'

/** A policy, and the share of the cache that it keeps. */
export interface Contender {
  readonly policy: Policy
  readonly keep: number
}

export interface Options {
  /** Every policy at every keep. */
  readonly contenders: readonly Contender[]
  /** Prompts of each task. */
  readonly prompts: number
  /** Where the figures go. */
  readonly json: string | undefined
  /** Where the page about the first prompt goes. */
  readonly report: string | undefined
  /** The model's folder. */
  readonly model: string
}

/** Something about the command line that its user can put right. */
export class UsageError extends Error {}

const flags = {
  policy: { type: 'string', multiple: true, default: ['laprox', 'snapkv'] },
  keep: { type: 'string', multiple: true, default: ['5%'] },
  prompts: { type: 'string', default: '2' },
  json: { type: 'string' },
  report: { type: 'string' },
  model: { type: 'string', default: fileURLToPath(new URL('model', import.meta.url)) },
  help: { type: 'boolean', short: 'h', default: false },
} satisfies ParseArgsConfig['options']

const modelFiles = ['config.json', 'extend.onnx', 'model.safetensors', 'tasks.safetensors', 'tokenizer.json']

export const help = `A language model answers from what is left of its KV cache.

  npm run demo -- [options]

  --policy NAMES   what to compare with the full cache, separated by commas or given again (${flags.policy.default})
                   ${presetNames.slice(0, 7).join(', ')},
                   ${presetNames.slice(7).join(', ')}
  --keep SHARES    how much of the cache to keep, as 5% or 0.05, one or more (${flags.keep.default})
  --prompts N      prompts of each task (${flags.prompts.default}); the model's folder holds up to 96, 64 take about ten minutes
  --json FILE      write the figures there
  --report FILE    write an HTML page there that shows what the first policy keeps of the first prompt
  --model DIR      a folder with another model: ${modelFiles.join(', ')}
  --help           print this`

/**
 * Reads the command line.
 *
 * @returns undefined where help is asked for
 * @throws UsageError
 */
export function readOptions(args: string[]): Options | undefined {
  for (const token of parseArgs({ args, options: flags, strict: false, tokens: true }).tokens) {
    if (token.kind === 'positional') throw new UsageError(`'${token.value}' belongs to no option`)
    if (token.kind === 'option') checkFlag(token.name, token.rawName, token.value)
  }
  const { values } = parseArgs({ args, options: flags })
  if (values.help) return undefined
  const model = resolve(values.model)
  const missing = modelFiles.filter((file) => !existsSync(join(model, file)))
  if (missing.length > 0) throw new UsageError(`--model ${model} lacks ${missing.join(', ')}`)
  const keeps = [...new Set(list('--keep', values.keep).map((text) => read('--keep', text, readShare)))]
  return {
    contenders: list('--policy', values.policy).flatMap((name) => keeps.map((keep) => ({ policy: readPolicy(name, keep), keep }))),
    prompts: read('--prompts', values.prompts, readCount),
    json: outputFile('--json', values.json),
    report: outputFile('--report', values.report),
    model,
  }
}

function outputFile(flag: string, name: string | undefined): string | undefined {
  if (name === undefined) return undefined
  const file = resolve(name)
  if (!existsSync(dirname(file))) throw new UsageError(`${flag} ${file}: there is no folder ${dirname(file)}`)
  return file
}

function checkFlag(name: string, raw: string, value: string | undefined): void {
  if (!Object.hasOwn(flags, name)) {
    const match = Object.keys(flags).find((flag) => isMisspelling(name, flag))
    throw new UsageError(`there is no option ${raw}${match === undefined ? '' : `; did you mean --${match}?`}`)
  }
  const wantsValue = flags[name as keyof typeof flags].type === 'string'
  if (wantsValue && (!value || value.startsWith('--'))) throw new UsageError(`${raw} wants a value`)
  if (!wantsValue && value !== undefined) throw new UsageError(`${raw} takes no value`)
}

/** Whether two letters or fewer are missing, added or exchanged. */
function isMisspelling(name: string, flag: string): boolean {
  const rest = [...flag]
  const strangers = [...name].filter((letter) => !rest.includes(letter) || !rest.splice(rest.indexOf(letter), 1))
  return flag.startsWith(name) || (strangers.length <= 2 && rest.length <= 2)
}

/** The items of lists separated by commas, each once. */
function list(flag: string, values: readonly string[]): string[] {
  const items = values.flatMap((item) => item.split(',')).map((item) => item.trim())
  if (items.includes('')) throw new UsageError(`${flag} ${values.join(' ')} has an empty item`)
  return [...new Set(items)]
}

function readPolicy(name: string, keep: number): Policy {
  try {
    return policy(name, { keep })
  } catch (error) {
    if (error instanceof LaproxError) throw new UsageError(`--policy: ${error.message}`)
    throw error
  }
}

function read<T>(flag: string, text: string, reader: (text: string) => T): T {
  try {
    return reader(text)
  } catch (error) {
    if (error instanceof InvalidArgumentError) throw new UsageError(`${flag} ${text}: ${error.message}`)
    throw error
  }
}
