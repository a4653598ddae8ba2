import { join } from 'node:path'
import { AttentionModel, type Device, type EvictReport, evict, KvCache, type Policy, readSafetensors, Tensor } from 'laprox'
import type * as onnx from 'onnxruntime-node'
import type { Prefill, Shape } from './language-model.js'
import { Past } from './past.js'
import { floats, lastRows } from './rows.js'

/** What laprox must know of a decoder: its sizes, and the output projection of each layer from model.safetensors. */
export async function openAttentionModel(device: Device, folder: string, shape: Shape): Promise<AttentionModel> {
  const names = Array.from({ length: shape.layers }, (_, layer) => `model.layers.${layer}.self_attn.o_proj.weight`)
  const { tensors } = await readSafetensors(join(folder, 'model.safetensors'), { names })
  return AttentionModel.create(device, { ...shape, outputProjections: names.map((name) => tensors.get(name)!) })
}

/** What a policy leaves of a prompt's cache, ready for the decoder to go on from. */
export async function compress(model: AttentionModel, { past, queries }: Prefill, policy: Policy): Promise<{ past: Past; report: EvictReport }> {
  using cache = KvCache.from(model.device, {
    keys: past.layers.map(({ key }) => view(key)),
    values: past.layers.map(({ value }) => view(value)),
  })
  const window = { queries: queries.map((query) => view(lastRows(query, policy.window))) }
  const evicted = await evict(model, cache, window, policy)
  using kept = evicted.cache
  return { past: Past.fromCache(kept), report: evicted.report }
}

/** ONNX Runtime's tensor as laprox's, over the same memory. */
function view(tensor: onnx.Tensor): Tensor<'float32'> {
  return new Tensor('float32', floats(tensor), tensor.dims)
}
