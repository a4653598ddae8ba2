import { parseArgs } from 'node:util'
import { UsageError } from '../options.js'

export interface Options {
  /** Small sizes and few runs: whether everything works, not how fast it is. */
  readonly quick: boolean
  readonly models: string | undefined
  readonly peers: boolean
  readonly profile: boolean
  /** Compile what must be compiled, and measure nothing. */
  readonly build: boolean
  readonly commit: string | undefined
  readonly json: string | undefined
  readonly markdown: string | undefined
  readonly from: string | undefined
}

export const help = `Measures laprox on a GPU.

  npm run bench:gpu -- [options]

  --json FILE       write the results there
  --markdown FILE   write them as a page there, and a chart beside it
  --from FILE       measure nothing: the results are those of a JSON file
  --models NAMES    some of Llama-3.1-8B,Llama-3.2-3B,Qwen2.5-7B,Llama-3.1-70B
  --quick           small sizes and few runs: whether everything works, not how fast it is
  --profile         also the time of each kernel
  --no-peers        nothing beside it in PyTorch
  --build           only compile the native program
  --commit NAME     of what is measured, where there is no repository
  --help            print this`

/**
 * Reads the command line.
 *
 * @returns undefined where help is asked for
 * @throws UsageError
 */
export function readOptions(args: string[]): Options | undefined {
  try {
    const { help, peers, ...values } = parseArgs({
      args,
      allowNegative: true,
      options: {
        json: { type: 'string' },
        markdown: { type: 'string' },
        from: { type: 'string' },
        models: { type: 'string' },
        commit: { type: 'string' },
        quick: { type: 'boolean', default: false },
        profile: { type: 'boolean', default: false },
        peers: { type: 'boolean', default: true },
        build: { type: 'boolean', default: false },
        help: { type: 'boolean', short: 'h', default: false },
      },
    }).values
    const { quick, models, profile, build, commit, json, markdown, from } = values
    return help ? undefined : { quick, models, peers, profile, build, commit, json, markdown, from }
  } catch (error) {
    throw new UsageError((error as Error).message)
  }
}
