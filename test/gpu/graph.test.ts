import { describe, expect, it } from 'vitest'
import { wrong } from '../../bench/gpu/goals.js'
import { measure } from '../../bench/gpu/program.js'
import type { Check, Line } from '../../bench/gpu/results.js'
import { emulated, onGpu, paths } from './gpu.js'

// Graphs are captured by whoever owns the stream: a program in CUDA, over the C ABI.
onGpu('a CUDA graph of an eviction', () => {
  describe.skipIf(emulated)(emulated ? 'replayed with other lengths (skipped: the GPU is emulated)' : 'replayed with other lengths', () => {
    it.each(paths.map(([kernels]) => kernels))('keeps what calls of these lengths keep, by the %s kernels', async (kernels) => {
      const sizes = ['--models', 'Llama-3.2-3B', '--tokens', '1024,4096', '--inputs', 'peaked,diffuse']
      const lines: Line[] = []
      for await (const line of measure(['--answers', '--stages', 'evict-replay', '--kernels', kernels, ...sizes])) lines.push(line)
      expect(lines.filter(({ kind }) => kind !== 'check' && kind !== 'model')).toEqual([])
      const checks = lines.filter(({ kind }) => kind === 'check') as unknown as Check[]
      const wanted = (n: number, input: string) => ({ n, input, kept: Math.floor(0.05 * n * 28 * 8) })
      expect(checks.map(({ n, input, kept }) => ({ n, input, kept }))).toEqual(
        ['peaked', 'diffuse'].flatMap((input) => [wanted(1024, input), wanted(4096, input)]),
      )
      expect(checks.map(wrong)).toEqual(checks.map(() => undefined))
    })
  })
})
