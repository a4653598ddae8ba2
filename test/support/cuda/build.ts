import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readFileSync, renameSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('../../..', import.meta.url))

/** The core that the addon was built with: CMake leaves it beside the folder of laprox.node. */
export function coreLibrary(): string | undefined {
  const native = process.env.LAPROX_NATIVE_PATH || join(root, '.cmake', 'Release', 'laprox.node')
  return [join(dirname(native), '..', 'liblaprox.a'), join(dirname(native), 'liblaprox.a')].find((path) => existsSync(path))
}

/**
 * Compiles the emulator of the CUDA backend (emulator.cpp); once for each version of it and of the core.
 *
 * @returns the path of the library, or why there is none
 */
export function buildEmulator(): { readonly path: string } | { readonly reason: string } {
  if (process.platform !== 'linux') return { reason: 'the emulator is built on Linux' }
  const archive = coreLibrary()
  if (archive === undefined) return { reason: 'the core was not built by CMake' }
  const source = fileURLToPath(new URL('emulator.cpp', import.meta.url))
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string }
  const hash = createHash('sha256').update(version)
  for (const file of [source, archive, join(root, 'native/core/cuda_table.h'), join(root, 'native/include/laprox/laprox.h')])
    hash.update(readFileSync(file))
  const folder = join(dirname(archive), 'emulator')
  const path = join(folder, `liblaprox_cuda-${hash.digest('hex').slice(0, 16)}.so`)
  if (existsSync(path)) return { path }
  mkdirSync(folder, { recursive: true })
  const unfinished = `${path}.${process.pid}`
  const sanitizers = archive.includes('.cmake-sanitize') ? ['-fsanitize=address,undefined'] : []
  const { status, stderr, error } = spawnSync(
    'g++',
    [
      ...['-std=c++20', '-O1', '-shared', '-fPIC', '-fvisibility=hidden', ...sanitizers, `-DLAPROX_VERSION="${version}"`],
      ...[`-I${join(root, 'native')}`, `-I${join(root, 'native/include')}`, source, archive],
      ...['-Wl,--exclude-libs,ALL', '-pthread', '-ldl', '-o', unfinished],
    ],
    { encoding: 'utf8', env: { ...process.env, LD_PRELOAD: '' } },
  )
  if (error !== undefined) return { reason: `g++: ${error.message}` }
  if (status !== 0) throw new Error(stderr)
  renameSync(unfinished, path)
  return { path }
}
