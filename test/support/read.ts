import type { KvCache, Tensor } from '../../lib/index.js'
import type { Problem, Segment } from '../oracle/problem.js'
import { type FloatType, read } from './half.js'

/** The rows of one head of a cache, wherever they lie: raw elements, so that a moved row can be compared bit for bit. */
export interface Rows {
  readonly keys: number[][]
  readonly values: number[][]
  readonly positions: number[] | undefined
}

/** Where token t of a head lies: its index in every dimension of `keys` but the last. */
function indexOf(cache: KvCache, layer: number, sequence: number, head: number, token: number, keys: Tensor): number[] {
  const { dims } = keys
  if (cache.kind === 'ragged') return [cache.rowStarts(layer)[sequence * cache.kvHeads + head]! + token]
  if (cache.kind === 'contiguous') return dims.length === 3 ? [head, token] : [sequence, head, token]
  const table = cache.pageTable(layer)
  const own = table.dims.length === 3
  // Only NHD pages are read here when shared: HND ones have the heads second.
  const heads = dims.length === 4 ? (dims[1] === cache.kvHeads && dims[2] !== cache.kvHeads ? 1 : 2) : -1
  const pageSize = heads === 1 ? dims[2]! : dims[1]!
  const row = own ? sequence * cache.kvHeads + head : sequence
  const page = table.data[table.offset + row * table.dims.at(-1)! + Math.floor(token / pageSize)]!
  const slot = token % pageSize
  return heads === -1 ? [page, slot] : heads === 1 ? [page, head, slot] : [page, slot, head]
}

const at = (tensor: Tensor, index: readonly number[]): number =>
  index.reduce((sum, i, dimension) => sum + i * tensor.strides[dimension]!, tensor.offset)

/** Heads in HND pages are told apart from slots by their number: such caches must not have as many heads as slots. */
export function readRows(cache: KvCache, layer: number, sequence: number, head: number): Rows {
  const keys = cache.keys(layer) as Tensor
  const values = cache.values(layer) as Tensor
  const positions = cache.hasPositions ? cache.positions(layer) : undefined
  const length = cache.lengths(layer)[sequence * cache.kvHeads + head]!
  const tokens = Array.from({ length }, (_, token) => indexOf(cache, layer, sequence, head, token, keys))
  const row = (tensor: Tensor, index: number[]): number[] => {
    const first = at(tensor, index)
    return Array.from({ length: cache.headDim }, (_, i) => Number((tensor.data as Float32Array)[first + i]))
  }
  return {
    keys: tokens.map((index) => row(keys, index)),
    values: tokens.map((index) => row(values, index)),
    positions: positions && tokens.map((index) => positions.data[at(positions, index)]!),
  }
}

/** The problem whose keys, values and positions are those that a cache holds. */
export function problemOf(cache: KvCache, like: Problem, type: FloatType): Problem {
  const { sequences, kvHeads } = like
  const layers = like.layers.map((layer, l) => ({
    ...layer,
    segments: layer.segments.map((segment, x): Segment => {
      const { keys, values, positions } = readRows(cache, l, Math.floor(x / kvHeads) % sequences, x % kvHeads)
      const numbers = (rows: number[][]): Float64Array => {
        const flat = rows.flat()
        return Float64Array.from(flat, (_, i) => read(type, flat, i))
      }
      return {
        length: keys.length,
        keys: numbers(keys),
        values: numbers(values),
        positions: Int32Array.from(positions ?? keys.keys()),
        contextLength: segment.contextLength,
      }
    }),
  }))
  return { ...like, layers }
}
