// Builds laprox.node: with cmake-js into .cmake/ where CMake is installed, else with node-gyp into build/.
// node native/build.mjs [--tool cmake-js|node-gyp] [--werror]
// LAPROX_CUDA_ARCHITECTURES: the GPUs that liblaprox_cuda is compiled for: -gencode options of nvcc, `none`, or `all` (minutes), which is the default.
import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..')
const folders = { 'cmake-js': join(root, '.cmake'), 'node-gyp': join(root, 'build') }
const binary = (tool) => join(folders[tool], 'Release', 'laprox.node')
const stamp = (tool) => join(folders[tool], 'fingerprint')

const wantedCuda = (process.env.LAPROX_CUDA_ARCHITECTURES ?? '').trim()

/** One hash of everything the binary is made of. */
function fingerprint() {
  const hash = createHash('sha256')
  hash.update(JSON.stringify([process.platform, process.arch, JSON.parse(readFileSync(join(root, 'package.json'))).version]))
  const add = (path) => {
    for (const entry of readdirSync(join(root, path), { withFileTypes: true }).sort((a, b) => (a.name < b.name ? -1 : 1))) {
      const child = `${path}/${entry.name}`
      if (entry.isDirectory()) add(child)
      else
        hash
          .update(child)
          .update('\0')
          .update(readFileSync(join(root, child)))
          .update('\0')
    }
  }
  add('native')
  add('cmake')
  for (const file of ['CMakeLists.txt', 'binding.gyp']) hash.update(readFileSync(join(root, file)))
  return hash.digest('hex')
}

/** `wanted`: the fingerprint, and the GPUs; or the fingerprint alone, whatever the GPUs are. */
const isFresh = (tool, wanted) => existsSync(binary(tool)) && existsSync(stamp(tool)) && readFileSync(stamp(tool), 'utf8').startsWith(wanted)

const hasGpu = () => existsSync('/dev/nvidiactl') || existsSync('/dev/dxg')

const hasNvcc = () => spawnSync(process.execPath, [join(root, 'native', 'nvcc.mjs')], { encoding: 'utf8' }).stdout !== ''

const hasCMake = () => spawnSync('cmake', ['--version'], { stdio: 'ignore' }).status === 0

/** The prefix of this Node, when its own headers lie there: node-gyp then has nothing to download. */
function ownHeaders() {
  const prefix = resolve(dirname(process.execPath), '..')
  const header = join(prefix, 'include', 'node', 'node_version.h')
  if (!existsSync(header)) return {}
  const text = readFileSync(header, 'utf8')
  const version = ['MAJOR', 'MINOR', 'PATCH'].map((part) => text.match(new RegExp(`NODE_${part}_VERSION (\\d+)`))?.[1]).join('.')
  return version === process.versions.node ? { npm_config_nodedir: prefix } : {}
}

function run(tool, werror, cuda) {
  const require = createRequire(import.meta.url)
  const jobs = String(availableParallelism())
  const commands = {
    'cmake-js': () => {
      const cli = require.resolve('cmake-js/bin/cmake-js')
      const options = ['-O', folders[tool], `--CDLAPROX_WERROR=${werror ? 'ON' : 'OFF'}`, `--CDLAPROX_CUDA=${cuda === 'none' ? 'OFF' : 'ON'}`]
      // Never empty: cmake-js leaves out what is, and CMake goes on with what it was told before.
      options.push(`--CDLAPROX_CUDA_ARCHITECTURES=${cuda === 'none' ? 'all' : cuda.split(/\s+/).join(';')}`)
      return [
        [cli, 'configure', ...options],
        [cli, 'build', ...options, '-p', jobs],
      ]
    },
    'node-gyp': () => {
      const cli = require.resolve('node-gyp/bin/node-gyp.js')
      return [
        [
          cli,
          'configure',
          '--release',
          '--',
          `-Dlaprox_werror=${werror ? 1 : 0}`,
          ...(cuda === 'none' ? ['-Dlaprox_nvcc='] : cuda === 'all' ? [] : [`-Dlaprox_cuda_only=${cuda}`]),
        ],
        [cli, 'build', '-j', jobs],
      ]
    },
  }
  for (const command of commands[tool]()) {
    const env = { ...ownHeaders(), ...process.env }
    const { status, stdout, stderr, error } = spawnSync(process.execPath, command, { cwd: root, env, encoding: 'utf8', maxBuffer: 1 << 28 })
    const output = `${stdout ?? ''}${stderr ?? ''}`
    if (status !== 0 || /\bwarning:/.test(output)) process.stderr.write(output)
    if (status !== 0) throw new Error(`laprox.node: ${tool} failed${error ? `: ${error.message}` : '; its output is above'}`)
  }
}

/**
 * Sees to it that laprox.node is there and made of the sources as they are; returns its path. To be `used` on this machine it may be made for
 * whatever GPUs, and the minutes of nvcc are spared where there is none.
 */
export function buildNative({ tool, werror = false, used = false } = {}) {
  const target = `${process.platform}-${process.arch}`
  const spared = used && wantedCuda === '' && !hasGpu()
  const cuda = wantedCuda || (spared ? 'none' : 'all')
  const sources = fingerprint()
  const wanted = used && wantedCuda === '' ? sources : `${sources} ${cuda}\n`
  const candidates = tool ? [tool] : Object.keys(folders)
  const fresh = candidates.find((name) => isFresh(name, wanted))
  if (fresh) {
    console.error(`laprox.node: up to date (${fresh}, ${target})`)
    return binary(fresh)
  }

  const chosen = tool ?? (hasCMake() ? 'cmake-js' : 'node-gyp')
  console.error(`laprox.node: building with ${chosen} ...`)
  const start = performance.now()
  run(chosen, werror, cuda)
  writeFileSync(stamp(chosen), `${sources} ${cuda}\n`)
  // The loader looks into .cmake first: what is stale there must not hide what node-gyp has just built.
  if (!isFresh('cmake-js', wanted)) rmSync(binary('cmake-js'), { force: true })
  const library = join(folders[chosen], 'Release', 'liblaprox_cuda.so')
  if (cuda === 'none') rmSync(library, { force: true })
  const lacks = spared
    ? 'this machine has no GPU; npm run build makes it'
    : cuda === 'none'
      ? 'not wanted'
      : hasNvcc()
        ? 'nvcc did not get to make it'
        : 'nvcc was not found'
  const backends = existsSync(library) ? 'CPU and CUDA backends' : `CPU backend (no CUDA backend: ${lacks})`
  console.error(`laprox.node: built with ${chosen} for ${target}, ${backends}, ${((performance.now() - start) / 1000).toFixed(1)} s`)
  return binary(chosen)
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { values } = parseArgs({ options: { tool: { type: 'string' }, werror: { type: 'boolean' } } })
  if (values.tool !== undefined && !(values.tool in folders)) {
    console.error(`--tool is ${values.tool}; expected ${Object.keys(folders).join(' or ')}`)
    process.exit(2)
  }
  try {
    buildNative(values)
  } catch (error) {
    console.error(error.message)
    process.exit(1)
  }
}
