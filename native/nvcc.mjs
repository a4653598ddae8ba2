// Tells binding.gyp about nvcc: prints `nvcc`, or nothing where there is none; with --libraries, the folder of its static runtime.
import { spawnSync } from 'node:child_process'

const { status, stdout, stderr } = spawnSync('nvcc', ['--dryrun', '-x', 'cu', '/dev/null'], { encoding: 'utf8' })
if (status === 0) {
  const libraries = /LIBRARIES=.*?"?-L([^"\s]*\/lib(?:64)?)"?(?:\s|$)/.exec(`${stdout}${stderr}`)
  process.stdout.write(process.argv.includes('--libraries') ? (libraries?.[1] ?? '.') : 'nvcc')
}
