// What a whole eviction on a GPU takes of the JavaScript thread, as the package that users get does it: microseconds until the call
// returns, and all in all, of each round. node test/support/cost.mjs KEEP ROUNDS -> JSON
import { performance } from 'node:perf_hooks'
import { AttentionModel, Device, evict, KvCache, policies, Tensor } from '../../dist/index.js'

const [keep, rounds] = process.argv.slice(2).map(Number)
const device = await Device.open('cuda')
const [layers, H, G, d, n, m] = [32, 32, 8, 128, 1024, 32]
const per = (...dims) =>
  Promise.all(
    Array.from({ length: layers }, () => new Tensor('bfloat16', new Uint16Array(dims.reduce((a, b) => a * b)).fill(0x3e00), dims).to(device)),
  )
const model = AttentionModel.create(device, { layers, queryHeads: H, kvHeads: G, headDim: d, outputProjections: await per(64, H * d) })
const pageTable = await new Tensor(
  'int32',
  Int32Array.from({ length: n / 16 }, (_, i) => i),
  [1, n / 16],
).to(device)
const cache = KvCache.from(device, { keys: await per(n / 16, 16, G, d), values: await per(n / 16, 16, G, d), layout: 'NHD', pageTable, lengths: [n] })
await cache.computeValueNorms()
const queries = await per(H, m, d)
const policy = policies.laprox({ keep })

const run = async () => {
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
const times = []
for (let i = 0; i < rounds; i++) times.push(await run())
console.log(JSON.stringify(times))
process.exit() // without waiting for the garbage collector to let go of the device
