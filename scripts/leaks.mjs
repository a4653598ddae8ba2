// Uses each part of the package some times, lets go of it in each way there is, and ends. scripts/sanitize.mjs looks at what is left.
import { AttentionModel, compact, Device, evict, KvCache, policies, score, select, Tensor } from '../dist/index.js'

const layers = 2
const queryHeads = 4
const kvHeads = 2
const headDim = 16
const length = 300
const window = 8

const numbers = (...dims) => {
  const data = Float32Array.from({ length: dims.reduce((product, dim) => product * dim) }, (_, i) => Math.sin(i * 0.7))
  return new Tensor('float32', data, dims)
}
const perLayer = (...dims) => Array.from({ length: layers }, () => numbers(...dims))

/** The work must be refused. */
async function refused(code, work) {
  try {
    await work()
  } catch (error) {
    if (error.code === code) return
    throw error
  }
  throw new Error(`expected ${code}`)
}

for (let round = 0; round < 8; round++) {
  const device = await Device.open('cpu', { threads: 1 + (round % 3) })
  const outputProjections = perLayer(queryHeads * headDim, queryHeads * headDim)
  const model = AttentionModel.create(device, { layers, queryHeads, kvHeads, headDim, outputProjections })
  const cache = KvCache.from(device, { keys: perLayer(kvHeads, length, headDim), values: perLayer(kvHeads, length, headDim) })
  const queries = { queries: perLayer(queryHeads, window, headDim) }
  const policy = policies.laprox({ keep: 0.25, window })

  const scores = await score(model, cache, queries, policy)
  const selection = await select(scores, policy)
  await compact(cache, selection)
  const { cache: kept } = await evict(model, cache, queries, policy)
  await refused('BUDGET_TOO_SMALL', () => evict(model, cache, queries, policies.laprox({ keep: { entries: 1 }, window })))
  const abort = new AbortController()
  const aborted = refused('ABORTED', () => evict(model, cache, queries, policy, { signal: abort.signal }))
  abort.abort()
  await aborted

  // Every other round leaves all of it to the garbage collector or to the end of the process.
  if (round % 2 === 0) for (const disposable of [kept, cache, model, device]) disposable.dispose()
}
