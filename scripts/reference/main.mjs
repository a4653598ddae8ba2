// The API reference, docs/api, from the doc comments of what package.json exports: TypeDoc and its Markdown plugin. They live in a
// package of their own because TypeDoc reads sources with a TypeScript that has a JavaScript API, older than the one laprox is built with.
// node scripts/reference/main.mjs [--check]     --check: writes nothing, and fails where docs/api is not what it would write
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Application, LogLevel } from 'typedoc'

const here = dirname(fileURLToPath(import.meta.url))
const root = resolve(here, '../..')
const committed = join(root, 'docs', 'api')

/** The sources of the package's entry points. */
function entryPoints() {
  const { exports } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
  const built = Object.values(exports).flatMap((target) => target.default ?? [])
  return built.map((file) => join(root, file.replace(/^\.\/dist\/(.*)\.js$/, 'lib/$1.ts')))
}

/** Writes the pages, and tells whether every comment and link is there. */
async function generate(folder) {
  const outputs = [{ name: 'markdown', path: folder }]
  const app = await Application.bootstrapWithPlugins({
    ...{ options: join(here, 'typedoc.json'), entryPoints: entryPoints(), outputs },
    logLevel: LogLevel.Warn,
  })
  const project = await app.convert()
  if (project === undefined) return false
  app.validate(project)
  await app.generateOutputs(project)
  return app.logger.errorCount + app.logger.warningCount === 0
}

const pages = (folder) => (existsSync(folder) ? readdirSync(folder, { recursive: true }).filter((name) => name.endsWith('.md')) : [])
const text = (folder, page) => (existsSync(join(folder, page)) ? readFileSync(join(folder, page), 'utf8') : undefined)

/** The pages of which both folders do not have the same text. */
function differing(folder, other) {
  return [...new Set([...pages(folder), ...pages(other)])].filter((page) => text(folder, page) !== text(other, page)).sort()
}

const check = process.argv.includes('--check')
const folder = check ? mkdtempSync(join(tmpdir(), 'laprox-reference-')) : committed
try {
  if (!(await generate(folder))) process.exitCode = 1
  const stale = check ? differing(folder, committed) : []
  if (stale.length > 0) {
    console.error(`docs/api: ${stale.join(', ')}: not what the comments say; npm run docs`)
    process.exitCode = 1
  }
} finally {
  if (check) rmSync(folder, { recursive: true })
}
