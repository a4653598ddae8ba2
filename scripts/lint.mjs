// Format and lint of TypeScript (biome) and of C and C++ (clang-format; clang-tidy where it is installed and CMake has built), whether docs/api
// says what the comments say, and the figures in the documentation (check-figures.ts).
// node scripts/lint.mjs [--fix]     --fix: formats, fixes what can be fixed safely, and writes the figures
import { execFile, spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..')
const fix = process.argv.includes('--fix')

function report(name, passed, remark = passed ? 'clean' : 'failed') {
  console.log(`${name}: ${remark}`)
  if (!passed) process.exitCode = 1
}

function run(name, command, args) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: ['ignore', 'inherit', 'inherit'] })
  report(name, status === 0, error?.message)
}

const bin = (name) => join(root, 'node_modules', '.bin', name)
const listFiles = (folder, pattern) =>
  readdirSync(join(root, folder), { recursive: true })
    .map((file) => `${folder}/${file}`)
    .filter((file) => pattern.test(file))
    .sort()

run('docs/api', process.execPath, [join(root, 'scripts', 'reference', 'main.mjs'), ...(fix ? [] : ['--check'])])
run('biome', bin('biome'), fix ? ['check', '--write'] : ['check', '--error-on-warnings'])

const text = [...listFiles('native', /\.(h|hpp|cpp|inl|cu|cuh)$/), ...listFiles('examples/c', /\.[ch]$/)]
run('clang-format', bin('clang-format'), fix ? ['-i', ...text] : ['--dry-run', '--Werror', ...text])

if (!existsSync(join(root, 'dist', 'index.js'))) report('figures', false, 'there is no dist/: npm run build:ts')
else run('figures', bin('tsx'), [join('scripts', 'check-figures.ts'), ...(fix ? ['--write'] : [])])

const { variables } = JSON.parse(readFileSync(join(root, 'native', 'sources.gypi'), 'utf8'))
const listed = Object.values(variables).flat()
const sources = ['native/core', 'native/cpu', 'native/addon'].flatMap((folder) => listFiles(folder, /\.cpp$/))
const missing = [...sources, ...listFiles('native/cuda', /\.cu$/)].filter((file) => !listed.includes(file))
report('native/sources.gypi', missing.length === 0, missing.length ? `lacks ${missing.join(', ')}` : 'complete')

// A kernel that does not wait for the one before it reads what is not written yet, and a non-coherent load what was there before.
const beginnings = new Set(['follow_previous();', 'lead_next();', 'accompany_previous(beside);', 'accompany_previous(true);'])
const careless = listFiles('native/cuda', /\.cuh?$/).flatMap((file) => {
  const source = readFileSync(join(root, file), 'utf8')
  const kernels = [...source.matchAll(/^(?!\/\/).*__global__[^{;]*\{\n(.*)/gm)].filter(([, first]) => !beginnings.has(first.trim()))
  return [
    ...kernels.map(([text]) => `${file}: ${text.split('\n').at(-2)}`),
    ...[...source.matchAll(/__ldg\(.*/g)].map(([text]) => `${file}: ${text}`),
  ]
})
report('kernels follow each other', careless.length === 0, careless.length ? `not these:\n${careless.join('\n')}` : 'all')

/** Older ones stumble over the C++20 library. */
const oldestTidy = 16
const tidy = ['clang-tidy', 'clang-tidy-19'].find(
  (name) => Number(spawnSync(name, ['--version'], { encoding: 'utf8' }).stdout?.match(/version (\d+)/)?.[1] ?? 0) >= oldestTidy,
)
if (!tidy) console.log(`clang-tidy: version ${oldestTidy} or newer is not installed, not run`)
else if (!existsSync(join(root, '.cmake', 'compile_commands.json'))) console.log('clang-tidy: no build in .cmake/, not run')
else {
  const otherTexts = [...variables.laprox_cpu_avx2, ...variables.laprox_cpu_avx512] // one with the baseline's
  const queue = sources.filter((file) => !otherTexts.includes(file))
  const findings = new Set()
  const worker = async () => {
    for (let file = queue.shift(); file; file = queue.shift())
      await promisify(execFile)(tidy, ['-p', '.cmake', '--quiet', file], { cwd: root, maxBuffer: 1 << 26 }).catch(({ stdout, message }) =>
        findings.add(stdout || message),
      )
  }
  await Promise.all(Array.from({ length: availableParallelism() }, worker))
  for (const finding of findings) console.log(finding)
  report('clang-tidy', findings.size === 0)
}
