import { writeFile } from 'node:fs/promises'
import type { BenchmarkJob } from './benchmark-process.js'
import { benchmarks } from './benchmarks.js'
import { describeCommit, describeMachine } from './machine.js'
import type { Measurement, Results } from './measurement.js'
import { checkFolders, help, type Options, readOptions, readResults, UsageError } from './options.js'
import { pageFiles } from './page.js'
import { inProcess } from './process.js'
import { lines, table } from './table.js'

async function measure({ only, quick, threads }: Options): Promise<Results> {
  const results: Measurement[] = []
  for (const name of only) {
    const job: BenchmarkJob = { name, quick, threads }
    for await (const measurement of inProcess<Measurement>('benchmark-process.ts', job)) {
      console.log(lines(measurement))
      results.push(measurement)
    }
  }
  return { machine: await describeMachine(), commit: describeCommit(), date: new Date().toISOString(), quick, results }
}

try {
  const options = readOptions(process.argv.slice(2), Object.keys(benchmarks))
  if (options === undefined) console.log(help(Object.keys(benchmarks)))
  else {
    await checkFolders([options.json, options.markdown])
    const results = options.from === undefined ? await measure(options) : await readResults<Results>(options.from, 'benchmark')
    console.log(`\n${table(results.results)}`)
    if (options.json !== undefined) await writeFile(options.json, `${JSON.stringify(results, undefined, 2)}\n`)
    if (options.markdown !== undefined) for (const [file, text] of pageFiles(options.markdown, results)) await writeFile(file, text)
  }
} catch (error) {
  if (!(error instanceof UsageError)) throw error
  console.error(`${error.message}\nnpm run bench -- --help says what there is.`)
  process.exitCode = 2
}
