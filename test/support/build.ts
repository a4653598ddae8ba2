import { AttentionModel, type Device, KvCache, Tensor, type Window } from '../../lib/index.js'
import type { Problem, Segment } from '../oracle/problem.js'
import { type FloatType, storage, write } from './half.js'
import type { Random } from './random.js'

/** Of CPU devices; a machine may lack some. */
export const INSTRUCTION_SETS = ['baseline', 'avx2', 'avx512', 'avx512bf16', 'amx'] as const

/** Where the rows of a cache lie. */
export type Layout =
  | { readonly kind: 'contiguous' }
  /** Contiguous, each key row followed by its value row. */
  | { readonly kind: 'packed' }
  /** Pages [pages, pageSize, G, d] or [pages, G, pageSize, d], one table for the heads of a sequence. */
  | { readonly kind: 'NHD' | 'HND'; readonly pageSize: number; readonly packed?: boolean }
  /** Pages [pages, pageSize, d] of one head each. */
  | { readonly kind: 'head-pages'; readonly pageSize: number }
  | { readonly kind: 'ragged' }

/** Layouts in which the heads of a sequence share their length. */
export const SHARED_LENGTH_LAYOUTS: readonly Layout[] = [
  { kind: 'contiguous' },
  { kind: 'packed' },
  ...[1, 16, 64].flatMap((pageSize): Layout[] => [
    { kind: 'NHD', pageSize },
    { kind: 'HND', pageSize },
    { kind: 'NHD', pageSize, packed: true },
  ]),
]

/** Layouts in which every head has its own length. */
export const OWN_LENGTH_LAYOUTS: readonly Layout[] = [
  { kind: 'head-pages', pageSize: 1 },
  { kind: 'head-pages', pageSize: 16 },
  { kind: 'head-pages', pageSize: 64 },
  { kind: 'ragged' },
]

/** An o_proj.weight [D, H * d] a layer; `transposed` stores it as [H * d, D] and hands over a strided view. */
export function buildModel(device: Device, problem: Problem, type: FloatType, transposed = false): AttentionModel {
  const { queryHeads, kvHeads, headDim, modelDim } = problem
  const features = queryHeads * headDim
  const outputProjections = problem.layers.map(({ projection }) => {
    const data = storage(type, features * modelDim)
    for (let feature = 0; feature < features; feature++) {
      for (let c = 0; c < modelDim; c++) {
        write(type, data, transposed ? feature * modelDim + c : c * features + feature, projection[feature * modelDim + c]!)
      }
    }
    return tensor(type, data, [modelDim, features], transposed ? { strides: [1, modelDim] } : {})
  })
  return AttentionModel.create(device, {
    layers: problem.layers.length,
    queryHeads,
    kvHeads,
    headDim,
    outputProjections,
    scale: problem.layers.map((layer) => layer.scale),
    softCap: problem.layers.map((layer) => layer.softCap),
    slidingWindow: problem.layers.map((layer) => layer.slidingWindow),
    sinkLogits: problem.layers.map((layer) => (layer.sinkLogits === undefined ? null : Float32Array.from(layer.sinkLogits))),
  })
}

/** The queries, and the log-sum-exp where the problem has it, to the base that it was rounded in. */
export function buildWindow(problem: Problem, type: FloatType, base: 'e' | '2' = 'e'): Window {
  const { sequences, queryHeads, headDim, rows, layers } = problem
  const queries = layers.map((layer) => {
    const data = storage(type, sequences * queryHeads * rows * headDim)
    for (const [at, value] of layer.queries.flatMap((sequence) => [...sequence]).entries()) write(type, data, at, value)
    return tensor(type, data, [sequences, queryHeads, rows, headDim])
  })
  if (layers[0]!.logSumExp === undefined) return { queries }
  const unit = base === '2' ? Math.LN2 : 1
  const logSumExp = layers.map((layer) => {
    const data = Float32Array.from(
      layer.logSumExp!.flatMap((sequence) => [...sequence]),
      (lse) => lse / unit,
    )
    return new Tensor('float32', data, [sequences, queryHeads, rows])
  })
  return { queries, logSumExp, logSumExpBase: base }
}

export interface CacheOptions {
  /** Original positions as a plane of the cache: required where they are not 0, 1, 2, ... */
  readonly positions?: boolean
  /** ||v|| of each row as a plane of the cache. */
  readonly valueNorms?: boolean
}

/**
 * The problem's keys and values in a layout. Pages lie in random order among others; whatever no token owns holds NaN, so
 * that reading it shows.
 */
export function buildCache(device: Device, problem: Problem, type: FloatType, layout: Layout, random: Random, options: CacheOptions = {}): KvCache {
  const { sequences, kvHeads, headDim } = problem
  const built = problem.layers.map((layer) => buildLayer(layer.segments, sequences, kvHeads, headDim, type, layout, random))
  const contextLengths = Int32Array.from({ length: sequences }, (_, s) => problem.layers[0]!.segments[s * kvHeads]!.contextLength)
  const planes = {
    keys: built.map(({ keys }) => keys),
    values: built.map(({ values }) => values),
    ...(options.positions ? { positions: built.map(({ positions }) => positions), contextLengths } : {}),
    ...(options.valueNorms ? { valueNorms: built.map(({ valueNorms }) => valueNorms) } : {}),
  }
  const lengths = problem.layers.map(({ segments }) => Int32Array.from(segments, ({ length }) => length))
  const sequenceLengths = lengths.map((all) => all.filter((_, at) => at % kvHeads === 0))
  switch (layout.kind) {
    case 'contiguous':
    case 'packed':
      return KvCache.from(device, { ...planes, lengths: sequenceLengths })
    case 'NHD':
    case 'HND':
      return KvCache.from(device, {
        ...planes,
        layout: layout.kind,
        pageTable: built.map(({ table }) => new Tensor('int32', table, [sequences, table.length / sequences])),
        lengths: sequenceLengths,
      })
    case 'head-pages':
      return KvCache.from(device, {
        ...planes,
        layout: 'NHD',
        pageTable: built.map(({ table }) => new Tensor('int32', table, [sequences, kvHeads, table.length / sequences / kvHeads])),
        lengths: lengths.map((all) => new Tensor('int32', all, [sequences, kvHeads])),
      })
    case 'ragged':
      return KvCache.from(device, { ...planes, lengths, contextLengths } as never)
  }
}

interface BuiltLayer {
  readonly keys: Tensor
  readonly values: Tensor
  readonly positions: Tensor<'int32'>
  readonly valueNorms: Tensor<'float32'>
  readonly table: Int32Array
}

/** Where a token of a segment lies: the row's number in a plane whose rows are numbered in storage order. */
type RowOf = (segment: number, token: number) => number

function buildLayer(
  segments: readonly Segment[],
  sequences: number,
  kvHeads: number,
  headDim: number,
  type: FloatType,
  layout: Layout,
  random: Random,
): BuiltLayer {
  const longest = Math.max(...segments.map(({ length }) => length))
  let dims: number[]
  let table = new Int32Array(0)
  let rowOf: RowOf
  switch (layout.kind) {
    case 'contiguous':
    case 'packed': {
      const capacity = longest + random.integer(longest === 0 ? 1 : 0, 3)
      dims = [sequences, kvHeads, capacity]
      rowOf = (segment, token) => segment * capacity + token
      break
    }
    case 'ragged': {
      const starts = segments.map((_, x) => segments.slice(0, x).reduce((sum, { length }) => sum + length, 0))
      dims = [segments.reduce((sum, { length }) => sum + length, 0)]
      rowOf = (segment, token) => starts[segment]! + token
      break
    }
    default: {
      const { pageSize } = layout
      const owners = layout.kind === 'head-pages' ? segments : segments.filter((_, x) => x % kvHeads === 0)
      const perOwner = Math.max(1, Math.ceil(longest / pageSize)) + random.integer(0, 2)
      const pages = owners.length * perOwner + random.integer(0, 3)
      const ids = random.shuffled(Array(pages).keys())
      table = Int32Array.from({ length: owners.length * perOwner }, (_, at) => {
        const used = Math.ceil(owners[Math.floor(at / perOwner)]!.length / pageSize)
        return at % perOwner < used ? ids[at]! : -1
      })
      const page = (owner: number, token: number): number => table[owner * perOwner + Math.floor(token / pageSize)]!
      if (layout.kind === 'head-pages') {
        dims = [pages, pageSize]
        rowOf = (segment, token) => page(segment, token) * pageSize + (token % pageSize)
      } else if (layout.kind === 'NHD') {
        dims = [pages, pageSize, kvHeads]
        rowOf = (segment, token) => (page(Math.floor(segment / kvHeads), token) * pageSize + (token % pageSize)) * kvHeads + (segment % kvHeads)
      } else {
        dims = [pages, kvHeads, pageSize]
        rowOf = (segment, token) => (page(Math.floor(segment / kvHeads), token) * kvHeads + (segment % kvHeads)) * pageSize + (token % pageSize)
      }
    }
  }

  const packed = layout.kind === 'packed' || (layout.kind === 'NHD' && layout.packed === true)
  const rows = dims.reduce((product, size) => product * size, 1)
  const keyData = filled(type, rows * headDim * (packed ? 2 : 1))
  const valueData = packed ? keyData : filled(type, rows * headDim)
  const rowStride = packed ? 2 * headDim : headDim
  const valueOffset = packed ? headDim : 0
  const positions = new Int32Array(rows).fill(-1)
  const valueNorms = new Float32Array(rows).fill(Number.NaN)
  for (const [x, segment] of segments.entries()) {
    for (let token = 0; token < segment.length; token++) {
      const row = rowOf(x, token)
      const value = segment.values.subarray(token * headDim, (token + 1) * headDim)
      for (let i = 0; i < headDim; i++) {
        write(type, keyData, row * rowStride + i, segment.keys[token * headDim + i]!)
        write(type, valueData, row * rowStride + valueOffset + i, value[i]!)
      }
      positions[row] = segment.positions[token]!
      valueNorms[row] = Math.hypot(...value)
    }
  }
  const strides = [...dims.map((_, at) => dims.slice(at + 1).reduce((product, size) => product * size, rowStride)), 1]
  return {
    keys: tensor(type, keyData, [...dims, headDim], { strides }),
    values: tensor(type, valueData, [...dims, headDim], { strides, offset: valueOffset }),
    positions: new Tensor('int32', positions, dims),
    valueNorms: new Tensor('float32', valueNorms, dims),
    table,
  }
}

function filled(type: FloatType, length: number): Float32Array | Uint16Array {
  const data = storage(type, length)
  for (let at = 0; at < length; at++) write(type, data, at, Number.NaN)
  return data
}

/** Tensor's constructor ties the type to its array, which a type chosen at run time cannot show the compiler. */
export function tensor(
  type: FloatType,
  data: Float32Array | Uint16Array,
  dims: readonly number[],
  options: { strides?: readonly number[]; offset?: number } = {},
): Tensor {
  return new Tensor(type, data as never, dims, options)
}
