import { performance } from 'node:perf_hooks'
import { expect, it } from 'vitest'
import { AttentionModel, evict, KvCache, policies, Tensor } from '../../lib/index.js'
import { device, emulated, onGpu } from './gpu.js'

onGpu('a whole eviction', () => {
  // A small share goes the pruned way, with half as many kernels again.
  it.each([0.05, 0.5])('takes the JavaScript thread less than 100 microseconds, at keep %f', async (keep) => {
    const [layers, H, G, d, n, m] = [32, 32, 8, 128, 1024, 32]
    const per = (...dims: number[]): Promise<Tensor[]> =>
      Promise.all(
        Array.from({ length: layers }, () => new Tensor('bfloat16', new Uint16Array(dims.reduce((a, b) => a * b)).fill(0x3e00), dims).to(device)),
      )
    const model = AttentionModel.create(device, { layers, queryHeads: H, kvHeads: G, headDim: d, outputProjections: await per(64, H * d) })
    const pageTable = await new Tensor(
      'int32',
      Int32Array.from({ length: n / 16 }, (_, i) => i),
      [1, n / 16],
    ).to(device)
    const cache = KvCache.from(device, {
      keys: await per(n / 16, 16, G, d),
      values: await per(n / 16, 16, G, d),
      layout: 'NHD',
      pageTable,
      lengths: [n],
    })
    await cache.computeValueNorms()
    const queries = await per(H, m, d)
    const policy = policies.laprox({ keep })
    const rounds = emulated ? 5 : 200
    const run = async (): Promise<[call: number, all: number]> => {
      const before = performance.eventLoopUtilization()
      const start = performance.now()
      const promise = evict(model, cache, { queries }, policy)
      const call = performance.now() - start
      const { cache: kept, selection } = await promise
      const { active } = performance.eventLoopUtilization(before)
      kept.dispose()
      selection.dispose()
      return [call * 1000, active * 1000]
    }
    for (let i = 0; i < rounds; i++) await run()
    const times: [number, number][] = []
    for (let i = 0; i < rounds; i++) times.push(await run())
    const quantile = (column: 0 | 1, share: number): number => times.map((time) => time[column]).sort((a, b) => a - b)[Math.floor(share * rounds)]!
    const shown = [0.1, 0.5, 0.9].map((share) => `${quantile(0, share).toFixed(0)}/${quantile(1, share).toFixed(0)}`)
    console.log(`evict, 32 layers, keep ${keep}: microseconds of the JavaScript thread, call/all, p10 p50 p90: ${shown.join(' ')}`)
    if (!emulated) expect(quantile(1, 0.5)).toBeLessThanOrEqual(100)
  })
})
