/** setups/model.ts, and what is made of it on a CPU device. */
import { AttentionModel, Device, KvCache } from '../../../lib/index.js'
import { headDim, keys, kvHeads, layers, outputProjections, queryHeads, values } from './model.js'

export * from './model.js'

export const device = await Device.open('cpu')
export const model = AttentionModel.create(device, { layers, queryHeads, kvHeads, headDim, outputProjections })
export const cache = KvCache.from(device, { keys, values })
