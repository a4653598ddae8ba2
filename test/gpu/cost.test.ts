import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { expect, it } from 'vitest'
import { emulated, onGpu } from './gpu.js'

const program = fileURLToPath(new URL('../support/cost.mjs', import.meta.url))

onGpu('a whole eviction', () => {
  // A small share goes the pruned way, with half as many kernels again.
  it.each([0.05, 0.5])('takes the JavaScript thread less than 100 microseconds, at keep %f', (keep) => {
    const rounds = emulated ? 5 : 1000
    const times = JSON.parse(execFileSync(process.execPath, [program, `${keep}`, `${rounds}`], { encoding: 'utf8' })) as [number, number][]
    expect(times).toHaveLength(rounds)
    const quantile = (column: 0 | 1, share: number): number => times.map((time) => time[column]).sort((a, b) => a - b)[Math.floor(share * rounds)]!
    const shown = [0.1, 0.5, 0.9].map((share) => `${quantile(0, share).toFixed(0)}/${quantile(1, share).toFixed(0)}`)
    console.log(`evict, 32 layers, keep ${keep}: microseconds of the JavaScript thread, call/all, p10 p50 p90: ${shown.join(' ')}`)
    if (!emulated) expect(quantile(1, 0.5)).toBeLessThanOrEqual(100)
  })
})
