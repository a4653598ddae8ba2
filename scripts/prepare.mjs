// What `npm test` and `npm run demo` need on a fresh clone: dependencies, laprox.node, dist/. Quick when nothing changed.
// Runs before node_modules exists: Node's own modules only.
import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { buildNative } from '../native/build.mjs'

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..')

function run(command, args) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: 'inherit' })
  if (error) throw error
  if (status !== 0) throw new Error(`${[command, ...args].join(' ')} failed`)
}

/** Whether node_modules holds what package-lock.json asks for (optional packages depend on the platform: not compared). */
function isInstalled() {
  const installed = join(root, 'node_modules', '.package-lock.json')
  if (!existsSync(installed)) return false
  const have = JSON.parse(readFileSync(installed, 'utf8')).packages
  const want = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')).packages
  return Object.entries(want).every(([path, { version, optional }]) => path === '' || optional || have[path]?.version === version)
}

try {
  if (!isInstalled()) {
    console.log('dependencies: installing ...')
    const npm = process.env.npm_execpath
    if (npm?.endsWith('npm-cli.js')) run(process.execPath, [npm, 'ci', '--no-audit', '--no-fund', '--loglevel=error'])
    else run('npm', ['ci', '--no-audit', '--no-fund', '--loglevel=error'])
  }
  buildNative({ used: true })
  run(process.execPath, [join(root, 'node_modules', 'typescript', 'bin', 'tsc'), '-p', 'tsconfig.build.json'])
  run(process.execPath, [join(root, 'scripts', 'build-page.mjs')])
} catch (error) {
  console.error(error.message)
  process.exit(1)
}
