// What stands on top of the CUDA backend, without a GPU: the tests of calls, selections and compactions on a GPU, with the CPU
// backend behind the table of liblaprox_cuda. `npm run test:gpu` runs all of them on a real one.
import { describe, it } from 'vitest'
import { buildEmulator } from './support/cuda/build.js'

const emulator = buildEmulator()
if ('path' in emulator) {
  // Before the library is looked for, which happens once a process.
  process.env.LAPROX_CUDA_PATH = emulator.path
  await import('./gpu/calls.test.js')
  await import('./gpu/cost.test.js')
  await import('./gpu/select.test.js')
  await import('./gpu/compact.test.js')
  await import('./gpu/docs.test.js')
  await import('./gpu/cli.test.js')
} else {
  describe.skip(`calls on an emulated GPU (skipped: ${emulator.reason})`, () => {
    it('are not tested', () => {})
  })
}
