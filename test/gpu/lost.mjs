// A child process whose GPU is lost: keys at an address that nobody has. See calls.test.ts.
import { AttentionModel, Device, evict, KvCache, policies, selectFrom, Tensor } from '../../dist/index.js'

const device = await Device.open('cuda')
const model = AttentionModel.create(device, { layers: 1, queryHeads: 2, kvHeads: 1, headDim: 64 })
const nowhere = Tensor.fromDevicePointer(device, 'bfloat16', 4096n, [1, 512, 64])
const cache = KvCache.from(device, { keys: [nowhere], values: [nowhere] })
const queries = [await new Tensor('bfloat16', new Uint16Array(2 * 4 * 64), [2, 4, 64]).to(device)]
const policy = policies.snapkv({ keep: 0.5, window: 4 })

const outcomes = await Promise.allSettled([
  evict(model, cache, { queries }, policy),
  selectFrom(model, cache, { queries }, policy),
  // Under way at that time, or later.
  queries[0].to('cpu'),
])
const later = await Promise.allSettled([selectFrom(model, cache, { queries }, policy), Tensor.allocate(device, 'float32', [4])])
const shown = (outcome) => (outcome.status === 'fulfilled' ? 'fulfilled' : [outcome.reason.code, outcome.reason.message])
console.log(JSON.stringify({ lost: device.lost, outcomes: outcomes.map(shown), later: later.map(shown) }))
// All of it can be let go of, and the process ends.
for (const disposable of [cache, model, queries[0], device]) disposable.dispose()
