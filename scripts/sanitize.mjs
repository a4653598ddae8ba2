// Builds the native code with AddressSanitizer and UndefinedBehaviorSanitizer into .cmake-sanitize/ and runs on it
//  1. the C example, with its leaks;
//  2. a program that uses the package and ends, with its leaks;
//  3. the test suite, without: its processes are killed in mid-work, and some tests want that.
// node scripts/sanitize.mjs [what to pass on to vitest]
import { spawnSync } from 'node:child_process'
import { readdirSync, readFileSync, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { checkC } from './check-c.mjs'

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..')
const require = createRequire(import.meta.url)
const folder = join(root, '.cmake-sanitize')
const cmake = require.resolve('cmake-js/bin/cmake-js')
const vitest = join(dirname(require.resolve('vitest/package.json')), 'vitest.mjs')

function build() {
  const options = ['-O', folder, '--CDLAPROX_SANITIZE=ON', '--CDCMAKE_CXX_FLAGS_RELEASE=-O1']
  for (const command of [['configure'], ['build', '-p', String(availableParallelism())]]) {
    const { status, stdout, stderr } = spawnSync(process.execPath, [cmake, ...command, ...options], {
      cwd: root,
      encoding: 'utf8',
      maxBuffer: 1 << 28,
    })
    if (status !== 0) throw new Error(`${stdout}${stderr}cmake-js ${command[0]} failed`)
  }
}

/** The runtime must be there before Node itself is. */
function runtime() {
  const { stdout, error } = spawnSync('g++', ['-print-file-name=libasan.so'], { encoding: 'utf8' })
  if (error) throw error
  const path = stdout.trim()
  if (!path.startsWith('/')) throw new Error('g++ has no libasan.so')
  return path
}

/** Reports go to files: the output of a test's process that dies is lost. */
function runNode(args, leaks) {
  const prefix = 'report.'
  const reports = () => readdirSync(folder).filter((name) => name.startsWith(prefix))
  for (const name of reports()) rmSync(join(folder, name))
  const options = `log_path=${join(folder, 'report')}`
  const { status } = spawnSync(process.execPath, args, {
    cwd: root,
    stdio: 'inherit',
    env: {
      ...process.env,
      LD_PRELOAD: runtime(),
      LAPROX_NATIVE_PATH: join(folder, 'Release', 'laprox.node'),
      // Tests ask for more memory than there is: that is to fail, not to end the process.
      ASAN_OPTIONS: `detect_leaks=${leaks ? 1 : 0}:allocator_may_return_null=1:${options}`,
      UBSAN_OPTIONS: `print_stacktrace=1:${options}`,
    },
  })
  const found = reports()
  for (const name of found) console.error(readFileSync(join(folder, name), 'utf8'))
  if (status !== 0 || found.length > 0) throw new Error(`${args[0]}: ${found.length} reports, exit status ${status}`)
}

try {
  console.log('sanitizers: building ...')
  build()
  checkC('sanitize')
  console.log('sanitizers: the C example is clean')
  runNode([join(root, 'scripts', 'leaks.mjs')], true)
  console.log('sanitizers: nothing leaks')
  runNode([vitest, 'run', '--testTimeout=600000', '--hookTimeout=600000', ...process.argv.slice(2)], false)
} catch (error) {
  console.error(error.message)
  process.exitCode = 1
}
