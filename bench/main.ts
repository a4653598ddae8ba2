import { readFile, writeFile } from 'node:fs/promises'
import { basename } from 'node:path'
import { compact } from './compact.js'
import { eventLoop } from './event-loop.js'
import { evict } from './evict.js'
import { growth } from './growth.js'
import { latency } from './latency.js'
import { describeCommit, describeMachine } from './machine.js'
import type { Benchmark, Measurement, Results } from './measurement.js'
import { help, type Options, readOptions, UsageError } from './options.js'
import { charts, page } from './page.js'
import { score } from './score.js'
import { select } from './select.js'
import { lines, table } from './table.js'

const benchmarks: Readonly<Record<string, Benchmark>> = { score, evict, select, compact, latency, 'event-loop': eventLoop, growth }

async function measure(options: Options): Promise<Results> {
  const results: Measurement[] = []
  for (const name of options.only) {
    for await (const measurement of benchmarks[name]!(options)) {
      console.log(lines(measurement))
      results.push(measurement)
    }
  }
  return { machine: await describeMachine(), commit: describeCommit(), date: new Date().toISOString(), quick: options.quick, results }
}

/** The page, and its charts beside it. */
async function writePage(file: string, results: Results): Promise<void> {
  const chartFile = (of: string, along: string) => of.replace(/(\.md)?$/, `-${along}.svg`)
  await writeFile(
    file,
    page(results, (along) => chartFile(basename(file), along)),
  )
  for (const { along, svg } of charts(results)) await writeFile(chartFile(file, along), svg)
}

try {
  const options = readOptions(process.argv.slice(2), Object.keys(benchmarks))
  if (options === undefined) console.log(help(Object.keys(benchmarks)))
  else {
    const results = options.from === undefined ? await measure(options) : (JSON.parse(await readFile(options.from, 'utf8')) as Results)
    console.log(`\n${table(results.results)}`)
    if (options.json !== undefined) await writeFile(options.json, `${JSON.stringify(results, undefined, 2)}\n`)
    if (options.markdown !== undefined) await writePage(options.markdown, results)
  }
} catch (error) {
  if (!(error instanceof UsageError)) throw error
  console.error(`${error.message}\nnpm run bench -- --help says what there is.`)
  process.exitCode = 2
}
