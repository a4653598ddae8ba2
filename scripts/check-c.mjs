// Installs the core into an empty prefix, builds examples/c against it with find_package(laprox), runs it and checks what it says.
// node scripts/check-c.mjs [shared] [static] [sanitize] [arm64] [addon]     (addon: what cmake-js has built for laprox.node)
import { spawnSync } from 'node:child_process'
import { rmSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = resolve(dirname(fileURLToPath(import.meta.url)), '..')

const sanitizers = '-fsanitize=address,undefined -fno-sanitize-recover=all'
const cross = [
  '-DCMAKE_SYSTEM_NAME=Linux',
  '-DCMAKE_SYSTEM_PROCESSOR=aarch64',
  '-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc',
  '-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++',
]

/** library: options of the core; example: options of the program; emulator: what runs it. */
const variants = {
  shared: { library: ['-DBUILD_SHARED_LIBS=ON'] },
  static: { library: ['-DBUILD_SHARED_LIBS=OFF'] },
  // What scripts/sanitize.mjs has built. Leaks are looked for: the program gives back all that it took.
  sanitize: {
    build: join(root, '.cmake-sanitize'),
    example: [`-DCMAKE_C_FLAGS=${sanitizers}`, `-DCMAKE_CXX_FLAGS=${sanitizers}`],
  },
  arm64: {
    library: ['-DBUILD_SHARED_LIBS=OFF', ...cross],
    example: cross,
    emulator: ['qemu-aarch64-static', '-L', '/usr/aarch64-linux-gnu'],
  },
  addon: { build: join(root, '.cmake') },
}

function run(command, args) {
  const { status, stdout, stderr, error } = spawnSync(command, args, { cwd: root, encoding: 'utf8' })
  if (error) throw error
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} failed:\n${stdout}${stderr}`)
  return stdout
}

/** Returns what the program printed; throws when anything is not as it should be. */
export function checkC(name) {
  const { library = [], example = [], emulator = [], build } = variants[name]
  const folder = join(root, '.cmake-c', name)
  const prefix = join(folder, 'prefix')
  const tree = build ?? join(folder, 'build')
  const jobs = String(availableParallelism())
  if (!build) {
    run('cmake', ['-S', root, '-B', tree, '-DLAPROX_WERROR=ON', '-DLAPROX_CUDA=OFF', ...library])
    run('cmake', ['--build', tree, '--parallel', jobs])
  }
  for (const stale of [prefix, join(folder, 'example')]) rmSync(stale, { recursive: true, force: true })
  run('cmake', ['--install', tree, '--prefix', prefix])
  run('cmake', [
    '-S',
    join(root, 'examples', 'c'),
    '-B',
    join(folder, 'example'),
    `-DCMAKE_PREFIX_PATH=${prefix}`,
    `-DCMAKE_FIND_ROOT_PATH=${prefix}`,
    '-DCMAKE_BUILD_TYPE=Release',
    ...example,
  ])
  run('cmake', ['--build', join(folder, 'example')])

  const program = join(folder, 'example', 'evict')
  if (emulator.length && spawnSync(emulator[0], ['--version']).error) return `compiled; ${emulator[0]} is not there to run it\n`
  const [command, ...args] = [...emulator, program]
  const printed = run(command, args)
  for (const expected of ['kept 96 of 384 entries', 'a ratio of 1.5: INVALID_ARGUMENT: '])
    if (!printed.includes(expected)) throw new Error(`the C example did not print "${expected}":\n${printed}`)
  return printed
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const names = process.argv.slice(2)
  const unknown = names.find((name) => !(name in variants))
  if (names.length === 0 || unknown) {
    console.error(`expected some of ${Object.keys(variants).join(', ')}${unknown ? `; got ${unknown}` : ''}`)
    process.exit(2)
  }
  try {
    for (const name of names) process.stdout.write(`${name}: ${checkC(name)}`)
  } catch (error) {
    console.error(error.message)
    process.exit(1)
  }
}
