import { join } from 'node:path'
import type { Device } from '../device.js'
import { AttentionModel } from '../model.js'
import { readSafetensors } from '../safetensors.js'
import type { DecoderShape } from './language-model.js'

/** What laprox must know of a decoder: its sizes, and the output projection of each layer from the folder's model.safetensors. */
export async function openAttentionModel(device: Device, folder: string, shape: DecoderShape): Promise<AttentionModel> {
  const names = Array.from({ length: shape.layers }, (_, layer) => `model.layers.${layer}.self_attn.o_proj.weight`)
  const { tensors } = await readSafetensors(join(folder, 'model.safetensors'), { names })
  return AttentionModel.create(device, { ...shape, outputProjections: names.map((name) => tensors.get(name)!) })
}
