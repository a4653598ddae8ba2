import { AttentionModel, type Device, KvCache, readSafetensors, type Window, writeSafetensors } from 'laprox'
import type { Layer, LayerShape } from '#lib/cli/synthetic'

/** One layer of Llama-3.1-8B. */
export function llamaShape(tokens: number): LayerShape {
  return { queryHeads: 32, kvHeads: 8, headDim: 128, modelDim: 4096, window: 32, tokens }
}

/** The operations of an entry's logits, and its pairs of heads. A multiplication and an addition are two operations. */
function entryOperations({ queryHeads, kvHeads, headDim, window }: LayerShape): { logits: number; pairs: number } {
  const group = queryHeads / kvHeads
  return { logits: 2 * group * window * headDim, pairs: (group * (group + 1)) / 2 }
}

/** The operations of every exact joint score of a layer, by the formula of docs/how-it-works.md. */
export function jointOperations(shape: LayerShape): number {
  const { kvHeads, headDim, window, tokens } = shape
  const { logits, pairs } = entryOperations(shape)
  const values = 2 * headDim * headDim * pairs
  const products = 2 * (window + headDim) * pairs
  return (logits + values + products) * kvHeads * tokens
}

/** What an eviction of the layer must compute at least: the logits of every key, the norm of every value, and so many estimates, by quadratic forms. */
export function evictionOperations(shape: LayerShape, estimates: number): number {
  const { kvHeads, headDim, window, tokens } = shape
  const { logits, pairs } = entryOperations(shape)
  const values = headDim * (headDim + 1) * pairs
  const products = 2 * window * pairs
  return (logits + 2 * headDim) * kvHeads * tokens + (logits + values + products) * estimates
}

export function shapeOf({ queries, keys, projection }: Layer): LayerShape {
  const [queryHeads, window, headDim] = queries.dims as [number, number, number]
  const [kvHeads, tokens] = keys.dims as [number, number, number]
  return { queryHeads, kvHeads, headDim, modelDim: projection.dims[0]!, window, tokens }
}

export async function writeLayer(file: string, layer: Layer): Promise<void> {
  await writeSafetensors(file, { ...layer })
}

export async function readLayer(file: string): Promise<Layer> {
  const { tensors } = await readSafetensors(file)
  return Object.fromEntries(tensors) as unknown as Layer
}

/** Layers as a device knows them. */
export interface Described {
  readonly model: AttentionModel
  readonly cache: KvCache
  readonly window: Window
}

/** Describes layers to a device, and waits until it has what it derives from them. */
export async function describe(device: Device, layers: readonly Layer[]): Promise<Described> {
  const { queryHeads, kvHeads, headDim } = shapeOf(layers[0]!)
  const model = AttentionModel.create(device, {
    layers: layers.length,
    queryHeads,
    kvHeads,
    headDim,
    outputProjections: layers.map(({ projection }) => projection),
  })
  await model.ready
  return {
    model,
    cache: describeCache(device, layers),
    window: { queries: layers.map(({ queries }) => queries) },
  }
}

/** Describes their keys and values alone. */
export function describeCache(device: Device, layers: readonly Layer[]): KvCache {
  return KvCache.from(device, { keys: layers.map(({ keys }) => keys), values: layers.map(({ values }) => values) })
}
