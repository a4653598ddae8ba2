import type { CacheState } from './cache.js'
import { alignedRows, byteExtent, byteStride, contiguousRows, floatType, located, object, sameType, shape, tensors, wrong } from './check.js'
import { LaproxError } from './errors.js'
import { type AttentionModel, floatTypes } from './model.js'
import { type Section, SectionWriter } from './native.js'
import type { Tensor } from './tensor.js'

/** The last queries of each sequence: whose attention decides what the cache's entries are worth. */
export interface Window {
  /**
   * Per layer [H, m, d], or [S, H, m, d] for a batch, rotated like the keys; float32, float16 or bfloat16. The last row is that
   * of the last token read. A policy uses its last `window` rows; fewer are enough only for sequences that are shorter.
   */
  readonly queries: readonly Tensor[]
  /** Per layer [H, m] or [S, H, m], float32: the log-sum-exp of each query's logits over the whole context, after scale, soft-cap, mask and sink. Default: computed. */
  readonly logSumExp?: readonly Tensor[] | undefined
  /** The base of its logarithm and exponentials. Default 'e'. */
  readonly logSumExpBase?: 'e' | '2' | undefined
}

const none: Section = { numbers: Float64Array.of(0, 0), buffers: [] }

/** A window for native code: the last `rows` queries. */
export function windowSection(window: Window | null | undefined, rows: number, needed: boolean, model: AttentionModel, cache: CacheState): Section {
  if (!needed) return none
  object(window, 'window', 'an object with queries, which this policy looks at')
  const given = rowsOf(window!.queries, 'queries', cache)
  const longest = cache.contextLengths === undefined || cache.positions === undefined ? max(cache.lengths) : max(cache.contextLengths)
  const used = Math.min(rows, given)
  if (used < Math.min(rows, longest) || used < 1) {
    throw new LaproxError(
      'INVALID_ARGUMENT',
      `queries have ${given} rows; expected the last ${Math.min(rows, Math.max(longest, 1))} queries, the policy's window`,
    )
  }
  return queriesSection(window!, 'queries', used, model, cache)
}

/** How many rows there are of queries [.., m, d]; throws unless there is one tensor a layer. */
export function rowsOf(queries: readonly Tensor[], at: string, cache: CacheState): number {
  return tensors(queries, at, cache.layers)[0]!.dims.at(-2) ?? 0
}

/** The last `rows` of a window's queries, which {@link rowsOf} has looked at, for native code; `at` is what errors call them. */
export function queriesSection(window: Window, at: string, rows: number, model: AttentionModel, cache: CacheState): Section {
  const { queries, logSumExp, logSumExpBase = 'e' } = window
  const given = queries[0]!.dims.at(-2)!
  const type = floatType(queries, at)
  const batched = queries[0]!.dims.length === 4
  if (!batched && cache.sequences > 1) throw wrong(`${at}[0]`, queries[0], `[S, H, m, d] for ${cache.sequences} sequences`)
  const dims = [model.queryHeads, given]
  if (batched) dims.unshift(cache.sequences)
  if (logSumExp !== undefined) sameType(tensors(logSumExp, 'logSumExp', cache.layers), 'logSumExp', 'float32')
  if (logSumExpBase !== 'e' && logSumExpBase !== '2') throw wrong('logSumExpBase', logSumExpBase, "'e' or '2'")

  located(queries, at, model.device)
  located(logSumExp, 'logSumExp', model.device)
  const gpu = model.device.backend === 'cuda'
  const queryDims = [...dims, model.headDim]

  const writer = new SectionWriter()
  writer.push(cache.layers, floatTypes.indexOf(type), rows, logSumExpBase === 'e' ? 0 : 1)
  for (let i = 0; i < queries.length; i++) {
    const tensor = queries[i]!
    if (!isOf(tensor, queryDims)) shape(tensor, `${at}[${i}]`, queryDims, batched ? '[S, H, m, d]' : '[H, m, d]')
    if (tensor.strides[queryDims.length - 1] !== 1) contiguousRows(tensor, `${at}[${i}]`)
    if (gpu) alignedRows(tensor, at, i)
    writeRows(writer, tensor, dims.length - 1, given - rows)
    const lse = logSumExp?.[i]
    if (lse !== undefined) shape(lse, `logSumExp[${i}]`, dims, batched ? '[S, H, m]' : '[H, m]')
    writeRows(writer, lse, dims.length - 1, given - rows)
  }
  return writer.section()
}

/** Whether a tensor has these dimensions. */
function isOf({ dims }: Tensor, wanted: readonly number[]): boolean {
  if (dims.length !== wanted.length) return false
  for (let i = 0; i < wanted.length; i++) if (dims[i] !== wanted[i]) return false
  return true
}

/** A tensor from row `skipped` of dimension `row` on; before that dimension stand the heads and, in a batch, the sequences. */
function writeRows(writer: SectionWriter, tensor: Tensor | undefined, row: number, skipped: number): void {
  if (tensor === undefined) {
    writer.push(-1, 0, 0, 0, 0, 0)
    return
  }
  const rowStride = byteStride(tensor, row)
  writer.place(tensor, skipped * tensor.strides[row]!)
  writer.push(byteExtent(tensor) - skipped * rowStride, byteStride(tensor, row - 2), byteStride(tensor, row - 1), rowStride)
}

function max(values: Int32Array): number {
  let most = 0
  for (let i = 0; i < values.length; i++) if (values[i]! > most) most = values[i]!
  return most
}
