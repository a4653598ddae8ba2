import type { KvCache } from '../cache.js'
import type { CallOptions } from '../call.js'
import type { Policy } from '../policy.js'
import { writeSafetensors } from '../safetensors.js'
import { Tensor } from '../tensor.js'

/** Where a file of kept rows comes from. */
export interface Provenance {
  /** The file that was evicted from. */
  readonly capture: string
  /** What the model is called. */
  readonly model: string | undefined
  readonly policy: Policy
  /** Tokens that the model had read. */
  readonly contextLength: number
}

/**
 * Writes what an eviction has kept as a safetensors file: for each layer `layers.<l>.keys` and `layers.<l>.values` [rows, headDim], the
 * KV heads one after the other, `layers.<l>.lengths` [kvHeads] and `layers.<l>.positions` [rows], both int32.
 *
 * @throws LaproxError (as a rejection) `IO`, `ABORTED`
 */
export async function writeKept(file: string, cache: KvCache, from: Provenance, options: Pick<CallOptions, 'signal'>): Promise<void> {
  const tensors: Record<string, Tensor> = {}
  for (let layer = 0; layer < cache.layers; layer++) {
    tensors[`layers.${layer}.keys`] = await cache.keys(layer).to('cpu', options)
    tensors[`layers.${layer}.values`] = await cache.values(layer).to('cpu', options)
    tensors[`layers.${layer}.positions`] = await cache.positions(layer).to('cpu', options)
    const lengths = cache.lengths(layer)
    tensors[`layers.${layer}.lengths`] = new Tensor('int32', lengths, [lengths.length])
  }
  const metadata = {
    'laprox.kept': '1',
    capture: from.capture,
    ...(from.model === undefined ? {} : { model: from.model }),
    policy: JSON.stringify(from.policy),
    context_length: String(from.contextLength),
  }
  await writeSafetensors(file, tensors, metadata, options)
}
