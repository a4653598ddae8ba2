/** What an engine has on its GPU: a pool of pages with two layers' keys and values, the last queries, a stream. */
import { Device, fromFloat32, Tensor } from '../../../lib/index.js'
import { Random } from '../../support/random.js'
import { headDim, kvHeads, layers, queryHeads, tokens } from './model.js'

export { headDim, kvHeads, layers, modelDim, outputProjections, queryHeads } from './model.js'

const memory = await Device.open('cuda')
const random = new Random(2)
/** Kept, so that the addresses stay valid. */
const tensors: Tensor[] = []

async function place(...dims: number[]): Promise<bigint> {
  const noise = Float32Array.from({ length: dims.reduce((product, dim) => product * dim, 1) }, () => random.normal())
  const tensor = await fromFloat32('bfloat16', noise, dims).to(memory)
  tensors.push(tensor)
  return tensor.pointer
}

export const pageSize = 16
export const pages = tokens / pageSize
export const engine = {
  layers: await Promise.all(
    Array.from({ length: layers }, async () => ({
      keys: await place(pages, pageSize, kvHeads, headDim),
      values: await place(pages, pageSize, kvHeads, headDim),
      queries: await place(queryHeads, 32, headDim),
    })),
  ),
  /** Of cudaMalloc or a pool of the engine's own. */
  allocate: (bytes: number): Promise<bigint> => place(bytes / 2),
  /** A cudaStream_t, as a bigint or by name. */
  stream: 'perThread' as const,
  /** A cudaEvent_t that it records when the prompt is read. */
  prefillDone: undefined as bigint | undefined,
}
export const pageTable = new Tensor(
  'int32',
  Int32Array.from({ length: pages }, (_, i) => i),
  [1, pages],
)
export const lengths = [tokens]
