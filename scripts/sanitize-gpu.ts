// The CUDA backend under compute-sanitizer, on small caches: out-of-bounds accesses and races. Says why and ends well where there is no GPU.
// tsx scripts/sanitize-gpu.ts
import { spawnSync } from 'node:child_process'
import { nativeProgram, reasonToSkip } from '../bench/gpu/program.js'

const reason = reasonToSkip() ?? (spawnSync('compute-sanitizer', ['--version']).status === 0 ? undefined : 'there is no compute-sanitizer')
if (reason !== undefined) {
  console.log(`skipped: ${reason}`)
} else {
  // Of a model's factors and of the program's data and reference: racecheck does not get through them in minutes.
  const slow = ['gram_kernel', 'cholesky', 'norm_kernel', 'bench'].flatMap((part) => ['--kernel-name-exclude', `kernel_substring=${part}`])
  const sizes = ['--answers', '--models', 'Llama-3.2-3B', '--tokens', '1024', '--inputs', 'peaked']
  for (const tool of ['memcheck', 'racecheck'])
    for (const kernels of ['hopper', 'portable']) {
      const args = ['--tool', tool, ...(tool === 'racecheck' ? slow : []), '--error-exitcode', '1', nativeProgram(), ...sizes, '--kernels', kernels]
      const { status, stdout } = spawnSync('compute-sanitizer', args, { encoding: 'utf8', maxBuffer: 1 << 28 })
      console.log(`${tool}, ${kernels} kernels: ${stdout.trim().split('\n').at(-1)}`)
      if (status !== 0) process.exitCode = 1
    }
}
