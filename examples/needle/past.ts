import type { KvCache } from 'laprox'
import { Tensor } from 'onnxruntime-node'
import { appendRows } from './rows.js'

/** Added to the logits of a padding row: its attention becomes exactly zero. */
const PADDING = -1e30

/** One layer of a decoder's past. */
export interface PastLayer {
  /** [kvHeads, rows, headDim], rotated. */
  readonly key: Tensor
  /** [kvHeads, rows, headDim] */
  readonly value: Tensor
  /** [kvHeads, rows], added to the logits: 0, or a large negative number where the row is padding. */
  readonly mask: Tensor
}

/** What a decoder has read, as its graph takes it: layers differ in their rows, heads of a layer are padded to the longest. */
export class Past {
  private constructor(readonly layers: readonly PastLayer[]) {}

  static empty(shape: { layers: number; kvHeads: number; headDim: number }): Past {
    const none = () => new Tensor('float32', new Float32Array(0), [shape.kvHeads, 0, shape.headDim])
    const mask = () => new Tensor('float32', new Float32Array(0), [shape.kvHeads, 0])
    return new Past(Array.from({ length: shape.layers }, () => ({ key: none(), value: none(), mask: mask() })))
  }

  /** The past that is left of one sequence in a compacted cache, whose heads keep different numbers of rows. */
  static fromCache(cache: KvCache): Past {
    return new Past(Array.from({ length: cache.layers }, (_, layer) => paddedLayer(cache, layer)))
  }

  /** This past and the tokens read since: their keys and values, a layer each, [kvHeads, tokens, headDim]. */
  append(keys: readonly Tensor[], values: readonly Tensor[]): Past {
    return new Past(
      this.layers.map(({ key, value, mask }, layer) => {
        const [heads, tokens] = keys[layer]!.dims as [number, number, number]
        const seen = new Tensor('float32', new Float32Array(heads * tokens), [heads, tokens])
        return {
          key: appendRows(key, keys[layer]!),
          value: appendRows(value, values[layer]!),
          mask: appendRows(mask, seen),
        }
      }),
    )
  }
}

function paddedLayer(cache: KvCache, layer: number): PastLayer {
  const { kvHeads, headDim } = cache
  const lengths = cache.lengths(layer)
  const starts = cache.rowStarts(layer)
  const rows = Math.max(...lengths)

  const padded = (source: ReturnType<KvCache['keys']>): Tensor => {
    const [from, to] = [source.data as Float32Array, new Float32Array(kvHeads * rows * headDim)]
    for (let head = 0; head < kvHeads; head++) {
      const begin = source.offset + starts[head]! * headDim
      to.set(from.subarray(begin, begin + lengths[head]! * headDim), head * rows * headDim)
    }
    return new Tensor('float32', to, [kvHeads, rows, headDim])
  }

  const mask = new Float32Array(kvHeads * rows)
  for (const [head, length] of lengths.entries()) mask.fill(PADDING, head * rows + length, (head + 1) * rows)
  return {
    key: padded(cache.keys(layer)),
    value: padded(cache.values(layer)),
    mask: new Tensor('float32', mask, [kvHeads, rows]),
  }
}
