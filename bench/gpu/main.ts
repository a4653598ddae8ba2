import { writeFile } from 'node:fs/promises'
import { describeCommit } from '../machine.js'
import { round } from '../markdown.js'
import { checkFolders, readResults, UsageError } from '../options.js'
import { goals, wrong } from './goals.js'
import { help, type Options, readOptions } from './options.js'
import { line, pageFiles } from './page.js'
import { measure, measurePeers, nativeProgram, reasonToSkip } from './program.js'
import { type Check, collect, finish, type Line, type Machine, type Measured, type Result, type Results } from './results.js'

async function run({ quick, models, peers, profile, commit = describeCommit() }: Options): Promise<Results | undefined> {
  const lines: Line[] = []
  const take = async (source: AsyncIterable<Line>, extra: Partial<Result> = {}) => {
    for await (const found of source) {
      if (extra.kernels !== undefined && found.kind === 'machine') continue
      lines.push({ ...found, ...extra })
      const machine = lines.find(({ kind }) => kind === 'machine') as (Line & Machine) | undefined
      if (found.kind === 'peer') console.log(line(found as unknown as Result))
      else if (found.kind === 'result') console.log(line({ ...finish(found as unknown as Measured, machine!), ...extra }))
      else if (found.kind !== 'profile') console.log(JSON.stringify(found))
    }
  }
  const sizes = quick ? ['--tokens', '8192', '--runs', '5'] : []
  const chosen = models === undefined ? [] : ['--models', models]
  await take(measure([...sizes, ...chosen, ...(profile ? ['--profile'] : [])]))
  const skipped = lines.find(({ kind }) => kind === 'skip')
  if (skipped !== undefined) {
    console.log(`skipped: ${skipped.reason}`)
    return undefined
  }
  const [first] = (models ?? 'Llama-3.1-8B').split(',')
  const portable = ['--kernels', 'portable', '--models', first!, '--tokens', quick ? '8192' : '131072', '--inputs', 'peaked']
  await take(measure([...portable, '--runs', quick ? '5' : '30', '--stages', 'evict-kept-norms,scan,score-joint']), { kernels: 'portable' })
  if (peers) await take(measurePeers([...sizes, ...chosen]))
  return collect(lines, { commit, quick })
}

function summary(run: Results): string {
  const checked = run.checks.map((check: Check) => ({ check, fault: wrong(check) }))
  return [
    ...goals(run).map(({ stage, what, n, limitMs, measuredMs, met }) => {
      const measured = measuredMs === undefined ? 'not measured' : `${round(measuredMs)} ms`
      return `${measuredMs === undefined ? 'MISSING' : met ? 'met    ' : 'NOT MET'} ${stage}, ${n} tokens (${what}): ${measured}, wanted at most ${round(limitMs)} ms`
    }),
    `${checked.filter(({ fault }) => fault === undefined).length} of ${checked.length} selections are right`,
    ...checked.flatMap(({ check: { model, n, input, stage }, fault }) =>
      fault === undefined ? [] : [`WRONG ${model} ${n} ${input} ${stage}: ${fault}`],
    ),
    ...run.failures.map(({ model, n, input, stage, error }) => `FAILED ${model} ${n} ${input} ${stage}: ${error}`),
  ].join('\n')
}

async function main(): Promise<void> {
  const options = readOptions(process.argv.slice(2))
  if (options === undefined) return console.log(help)
  if (options.build) return console.log(nativeProgram())
  if (options.from === undefined) {
    const reason = reasonToSkip()
    if (reason !== undefined) return console.log(`skipped: ${reason}`)
  }
  await checkFolders([options.json, options.markdown])
  const results = options.from === undefined ? await run(options) : await readResults<Results>(options.from, 'stage')
  if (results === undefined) return
  console.log(`\n${summary(results)}`)
  if (options.json !== undefined) await writeFile(options.json, `${JSON.stringify(results, undefined, 1)}\n`)
  if (options.markdown !== undefined) for (const [file, text] of pageFiles(options.markdown, results)) await writeFile(file, text)
  if (results.checks.some((check) => wrong(check) !== undefined)) process.exitCode = 1
}

try {
  await main()
} catch (error) {
  if (!(error instanceof UsageError)) throw error
  console.error(`${error.message}\nnpm run bench:gpu -- --help says what there is.`)
  process.exitCode = 2
}
