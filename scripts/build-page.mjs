// Builds the page of reports, lib/report/page, into dist/report/page.html: one file with its style, its script and the licences of
// what is bundled; {{title}} and {{data}} are filled in by lib/report/report.ts. Does nothing where nothing changed.
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..')
const folder = join(root, 'lib', 'report', 'page')
const page = join(root, 'dist', 'report', 'page.html')
const read = (...path) => readFileSync(join(...path), 'utf8')

/** The licences of the packages that may end up in the script. */
const licences = { echarts: ['NOTICE', 'LICENSE', 'licenses/LICENSE-d3'], zrender: ['LICENSE'], tslib: ['LICENSE.txt'] }

/** One hash of what the page is made of; package.json pins the versions of the packages. */
function fingerprint() {
  const sources = readdirSync(folder).map((name) => join(folder, name))
  const hash = createHash('sha256')
  for (const file of [
    ...sources,
    join(root, 'lib/report/payload.ts'),
    join(root, 'lib/cli/table.ts'),
    join(root, 'package.json'),
    fileURLToPath(import.meta.url),
  ])
    hash.update(file.slice(root.length)).update('\0').update(readFileSync(file)).update('\0')
  return hash.digest('hex').slice(0, 16)
}

/** The licences of the packages in a bundle. */
function licenceTexts(inputs) {
  const packages = new Map()
  for (const input of inputs) {
    const [path, name] = input.match(/^.*node_modules\/((?:@[^/]+\/)?[^/]+)/) ?? []
    if (path) packages.set(name, path)
  }
  return [...packages]
    .sort()
    .flatMap(([name, path]) => {
      if (!licences[name]) throw new Error(`${name} is bundled into the page of reports, but scripts/build-page.mjs does not know its licence`)
      const { version } = JSON.parse(read(root, path, 'package.json'))
      return licences[name].map((file) => `${name} ${version}, ${file}\n\n${read(root, path, file).trim()}\n`)
    })
    .join(`\n${'-'.repeat(80)}\n\n`)
}

const escapeHtml = (text) => text.replaceAll('&', '&amp;').replaceAll('<', '&lt;')

/** Builds it, unless it is there already. */
export async function buildPage() {
  const wanted = `<!-- laprox ${fingerprint()} -->`
  if (existsSync(page) && readFileSync(page, 'utf8').startsWith(`<!doctype html>\n${wanted}`)) return
  const { build } = await import('esbuild')
  const options = { absWorkingDir: root, bundle: true, minify: true, write: false, target: 'es2022', legalComments: 'inline' }
  const [script, style] = await Promise.all([
    build({ ...options, entryPoints: [join(folder, 'main.ts')], format: 'iife', metafile: true }),
    build({ ...options, entryPoints: [join(folder, 'page.css')] }),
  ])
  const code = script.outputFiles[0].text.replaceAll('</script', '<\\/script')
  const parts = {
    '<!doctype html>': `<!doctype html>\n${wanted}`,
    '<link rel="stylesheet" href="page.css">': `<style>${style.outputFiles[0].text}</style>`,
    '<script src="main.js"></script>': `<script>${code}</script>`,
    '{{hash}}': `sha256-${createHash('sha256').update(code).digest('base64')}`,
    '{{licences}}': escapeHtml(licenceTexts(Object.keys(script.metafile.inputs))),
  }
  const html = Object.entries(parts).reduce(
    (text, [place, part]) => {
      if (text.split(place).length !== 2) throw new Error(`page.html has ${place} ${text.split(place).length - 1} times; expected once`)
      return text.replace(place, () => part)
    },
    read(folder, 'page.html'),
  )
  mkdirSync(dirname(page), { recursive: true })
  writeFileSync(page, html)
  console.log(`page of reports: ${(html.length / 1024).toFixed(0)} KiB`)
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await buildPage()
