import { dirname, join } from 'node:path'
import { afterAll, expect, it } from 'vitest'
import { readPages } from '../docs/markdown.js'
import { clean, isForGpu, programsOf, runC, runTypeScript, writeTypeScript } from '../docs/programs.js'
import { coreLibrary } from '../support/cuda/build.js'
import { onGpu } from './gpu.js'

const pages = readPages()

afterAll(clean)

onGpu('what README and the guides show', () => {
  const typescript = pages.flatMap((page) => programsOf(page, 'ts')).filter(isForGpu)
  it.each(typescript.map((program) => [`${program.page.path}:${program.blocks[0]!.line}`, program] as const))('%s runs', async (_, program) => {
    await runTypeScript(writeTypeScript(program))
  })

  const library = coreLibrary()
  const c = pages.flatMap((page) => programsOf(page, 'c')).filter(isForGpu)
  it.skipIf(library === undefined).each(c.map((program) => [`${program.page.path}:${program.blocks[0]!.line}`, program] as const))(
    '%s compiles and runs',
    (_, program) => {
      expect(
        runC(program, library!, { LAPROX_CUDA_PATH: process.env.LAPROX_CUDA_PATH ?? join(dirname(library!), 'Release', 'liblaprox_cuda.so') }),
      ).toBe('')
    },
  )
})
