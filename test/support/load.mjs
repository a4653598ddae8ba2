// A model and a cache that take a while, for tests that interrupt: plain JavaScript over the built package, so that worker
// threads and child processes can run it as it is.
import { AttentionModel, Device, KvCache, policies, Tensor } from '../../dist/index.js'

const QUERY_HEADS = 32
const KV_HEADS = 4
const HEAD_DIM = 64
const MODEL_DIM = 128
const ROWS = 64

function noise(length) {
  const values = new Float32Array(length)
  const some = Math.min(length, 1 << 16)
  let state = 1
  for (let i = 0; i < some; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) | 0
    values[i] = state / 2 ** 31
  }
  for (let filled = some; filled < length; filled *= 2) values.copyWithin(filled, 0, Math.min(filled, length - filled))
  return values
}

/** One layer of `length` tokens. Scoring 100,000 of them takes a second or more. */
export async function load(length, options = { threads: 2 }) {
  const device = await Device.open('cpu', options)
  const tensor = (...dims) => new Tensor('float32', noise(dims.reduce((a, b) => a * b)), dims)
  const model = AttentionModel.create(device, {
    layers: 1,
    queryHeads: QUERY_HEADS,
    kvHeads: KV_HEADS,
    headDim: HEAD_DIM,
    outputProjections: [tensor(MODEL_DIM, QUERY_HEADS * HEAD_DIM)],
  })
  const keys = [tensor(KV_HEADS, length, HEAD_DIM)]
  const values = [tensor(KV_HEADS, length, HEAD_DIM)]
  const cache = KvCache.from(device, { keys, values })
  const window = { queries: [tensor(QUERY_HEADS, ROWS, HEAD_DIM)] }
  return { device, model, cache, window, keys, values, policy: policies.laprox({ keep: 0.1, window: ROWS, sinks: 0, recent: 0 }) }
}
