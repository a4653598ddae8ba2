import { readFile, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { run } from '#lib/cli/program'
import type { Evaluation } from '#lib/evaluation/evaluation'
import { pageFiles } from './page.js'

// `npm run eval`: laprox eval with the demo's model, then the page and its charts beside the results of a whole run.
const args = process.argv.slice(2)
const { values } = parseArgs({
  args,
  strict: false,
  options: { from: { type: 'string' }, json: { type: 'string' }, quick: { type: 'boolean' }, help: { type: 'boolean', short: 'h' } },
})
const moreHelp = `
npm run eval is laprox eval with the demo's model. A whole run writes docs/evaluation/results.json, where --json does not name another file,
and beside it a page and its charts; so does

  npm run eval -- --from FILE    with results that are there, measuring nothing
`
const published = fileURLToPath(new URL('../../docs/evaluation/results.json', import.meta.url))

async function writePage(results: string): Promise<void> {
  const evaluation: Evaluation = JSON.parse(await readFile(results, 'utf8'))
  for (const [file, text] of pageFiles(evaluation)) await writeFile(join(dirname(results), file), text)
}

async function measure(): Promise<number> {
  const stop = new AbortController()
  process.once('SIGINT', () => stop.abort(130))
  const model = fileURLToPath(new URL('../../examples/needle/model', import.meta.url))
  const json = typeof values.json === 'string' ? values.json : values.quick ? 'evaluation.json' : published
  const { stdout, stderr } = process
  const code = await run(['eval', '--model', model, '--json', json, ...args], { stdout, stderr, signal: stop.signal })
  if (values.help) stdout.write(moreHelp)
  else if (code === 0 && !values.quick) await writePage(json)
  return code
}

try {
  if (typeof values.from === 'string') await writePage(values.from)
  else process.exitCode = await measure()
} catch (error) {
  if (typeof values.from !== 'string') throw error
  console.error(`--from ${values.from} is no evaluation's results: ${(error as Error).message}`)
  process.exitCode = 2
}
