import { access, constants, readFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import { parseArgs } from 'node:util'
import { suggest } from '../lib/errors.js'
import type { Settings } from './measurement.js'

export interface Options extends Settings {
  /** Names of benchmarks. */
  readonly only: readonly string[]
  /** Where results go; undefined: nowhere. */
  readonly json: string | undefined
  readonly markdown: string | undefined
  /** Results to write the table of, instead of measuring. */
  readonly from: string | undefined
}

/** Something about the command line that its user can put right. */
export class UsageError extends Error {}

/** What the repository holds: the results of a whole run. */
const published = { json: 'bench/results/cpu.json', markdown: 'docs/benchmarks.md' } as const

export function help(names: readonly string[]): string {
  return `Measures laprox.

  npm run bench -- [options]

  --only NAMES      some of ${names.join(', ')}
  --quick           small sizes and few repeats: whether everything works, not how fast it is
  --threads N       of laprox and of what it is compared with (2)
  --json FILE       write the results there
  --markdown FILE   write them as a page there, and charts beside it
  --from FILE       measure nothing: the results are those of a JSON file
  --help            print this

A whole run, neither quick nor of some benchmarks, writes ${published.json}, and
${published.markdown} with its charts, where it is not told otherwise; --from writes the latter.`
}

/**
 * Reads the command line.
 *
 * @returns undefined where help is asked for
 * @throws UsageError
 */
export function readOptions(args: string[], names: readonly string[]): Options | undefined {
  const values = parse(args)
  if (values.help) return undefined
  const only = (values.only ?? []).flatMap((list) => list.split(',')).filter((name) => name !== '')
  for (const name of only) if (!names.includes(name)) throw new UsageError(`there is no benchmark '${name}'; ${suggest(name, names)}`)
  const threads = Number(values.threads)
  if (!Number.isInteger(threads) || threads < 1) throw new UsageError(`--threads ${values.threads} is no number of threads`)
  const { quick, from } = values
  const whole = !quick && only.length === 0
  return {
    only: only.length > 0 ? only : names,
    quick,
    threads,
    json: values.json ?? (whole && from === undefined ? published.json : undefined),
    markdown: values.markdown ?? (whole ? published.markdown : undefined),
    from,
  }
}

/**
 * Reads what an earlier run wrote.
 *
 * @param field what each of its results has
 * @throws UsageError
 */
export async function readResults<Run extends { readonly results: readonly object[] }>(file: string, field: string): Promise<Run> {
  const run = await readFile(file, 'utf8')
    .then((text) => JSON.parse(text) as Partial<Run>)
    .catch((error: Error) => {
      throw new UsageError(`--from ${file}: ${error.message}`)
    })
  if (!run.results?.every((result) => field in result)) throw new UsageError(`--from ${file}: expected results that each have a '${field}'`)
  return run as Run
}

/**
 * Looks whether files could be written, before minutes are spent on what goes into them.
 *
 * @throws UsageError
 */
export async function checkFolders(files: readonly (string | undefined)[]): Promise<void> {
  for (const file of files) {
    if (file === undefined) continue
    await access(dirname(file), constants.W_OK).catch((error: Error) => {
      throw new UsageError(`${file} cannot be written: ${error.message}`)
    })
  }
}

function parse(args: string[]) {
  try {
    return parseArgs({
      args,
      options: {
        only: { type: 'string', multiple: true },
        quick: { type: 'boolean', default: false },
        threads: { type: 'string', default: '2' },
        json: { type: 'string' },
        markdown: { type: 'string' },
        from: { type: 'string' },
        help: { type: 'boolean', short: 'h', default: false },
      },
    }).values
  } catch (error) {
    throw new UsageError((error as Error).message)
  }
}
