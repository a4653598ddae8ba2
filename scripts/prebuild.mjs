// npm runs this before it packs: dist/ from scratch, and the stripped binaries of this platform under prebuilds/.
import { spawnSync } from 'node:child_process'
import { copyFileSync, existsSync, mkdirSync, rmSync } from 'node:fs'
import { basename, dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { buildNative } from '../native/build.mjs'

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..')

function run(command, args) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: ['ignore', process.stderr, 'inherit'] })
  if (error || status !== 0) throw error ?? new Error(`${[command, ...args].join(' ')} failed`)
}

const binary = buildNative()
rmSync(join(root, 'dist'), { recursive: true, force: true })
run(process.execPath, [join(root, 'node_modules', 'typescript', 'bin', 'tsc'), '-p', 'tsconfig.build.json'])
run(process.execPath, [join(root, 'scripts', 'build-page.mjs')])

rmSync(join(root, 'prebuilds'), { recursive: true, force: true })
const folder = join(root, 'prebuilds', `${process.platform}-${process.arch}`)
mkdirSync(folder, { recursive: true })
for (const file of [binary, join(dirname(binary), 'liblaprox_cuda.so')]) {
  if (!existsSync(file)) continue // the CUDA backend, where there was no nvcc
  const copy = join(folder, basename(file))
  copyFileSync(file, copy)
  if (process.platform === 'linux') run('strip', ['--strip-unneeded', copy])
}
