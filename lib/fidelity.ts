import type { CacheState, KvCache } from './cache.js'
import { type CallOptions, call, part } from './call.js'
import { object } from './check.js'
import { LaproxError } from './errors.js'
import { type AttentionModel, projectionsOf } from './model.js'
import { holding, native, type Section } from './native.js'
import { modelWithCache } from './score.js'
import { type Selection, selectionOn } from './selection.js'
import type { Tensor } from './tensor.js'
import { queriesSection, rowsOf, type Window } from './window.js'

/** Queries of tokens that come after those of a cache. */
export interface LaterQueries {
  /**
   * Per layer [H, k, d], or [S, H, k, d] for a batch: the k queries after the last token read, at positions `context`,
   * `context + 1` and so on, rotated like the keys; 1 to 128 of them. Of what they look at, tokens read meanwhile are left out.
   */
  readonly queries: readonly Tensor[]
}

/** What {@link fidelity} takes. */
export interface FidelityOptions extends CallOptions {
  /** Also the errors over these. Default: none. */
  readonly later?: LaterQueries | undefined
}

/** ||O_kept - O||_F / ||O||_F. */
export interface RelativeErrors {
  /** Over the observation window. */
  readonly window: number
  /** Over the later queries; there where they were given. */
  readonly later?: number
}

/** What {@link fidelity} gives: the errors over all layers together, and of each. */
export interface Fidelity extends RelativeErrors {
  /** [L] */
  readonly layers: readonly RelativeErrors[]
}

/** Rows that count, at most. */
const mostRows = 128

/**
 * How far the output of each layer moves where only a selection of a cache is kept: what can be known of an eviction's quality
 * without running the model.
 *
 *     const { window, later, layers } = await fidelity(model, cache, selection, { queries }, { later: { queries: next } })
 *
 * O = sum over query heads of softmax(q K) V W_O, [rows, D], is what attention adds to the residual stream; O_kept is the same over
 * the kept tokens, with a softmax over them (and the sink logit). The error of a layer is ||O_kept - O||_F / ||O||_F over the
 * sequences of a batch and the given rows; for all layers together, the squares of both norms are added up first. It is exact to
 * float32, and 0 where everything is kept. Where O is 0, it is 0 if O_kept is, else infinite. Each layer is fed what it would get
 * without eviction: how errors add up from layer to layer is not in it.
 *
 * Computed in one pass over the cache on a CPU device, in about the time of exact scores; a log-sum-exp is not needed.
 *
 * @param cache as it was before the compaction: it is the full cache
 * @param selection of this cache
 * @param window all its rows count, the last 128 at most
 * @throws LaproxError (as a rejection) `INVALID_ARGUMENT`, `OUT_OF_BOUNDS` for tokens or pages that do not exist, `UNSUPPORTED` for a
 *   model without output projections or on a GPU, `NON_FINITE` where an output is not finite, `OUT_OF_MEMORY`, `DISPOSED`, `DETACHED`,
 *   `DEVICE_MISMATCH`, `ABORTED`
 */
export async function fidelity(
  model: AttentionModel,
  cache: KvCache,
  selection: Selection,
  window: Window,
  options: FidelityOptions = {},
): Promise<Fidelity> {
  const inputs = modelWithCache(model, cache)
  const { state } = inputs
  const { device } = model
  if (device.backend === 'cuda') {
    throw new LaproxError(
      'UNSUPPORTED',
      `fidelity is computed on CPU devices, and the model is on ${device.name}: create model and cache on one, from copies in host memory ` +
        "(await tensor.to('cpu'), await selection.to('cpu'))",
    )
  }
  object(options, 'options', 'an object')
  const kept = selectionOn(device, state, selection)
  const passes = [observation(window, model, state)]
  if (options.later !== undefined) passes.push(continuation(options.later, model, state))
  const all = passes.reduce((sum, { rows }) => sum + rows, 0)
  const projections = projectionsOf(model)

  return call(device, options, async (hooks) => {
    let done = 0
    // At once, one behind the other: nothing can be disposed of between them.
    const running = passes.map(({ ahead, rows, queries }) => {
      const section = holding(queries, projections)
      const squares = new Float64Array(2 * state.layers)
      const { progress, flag } = part(hooks, done / all, (done + rows) / all)
      done += rows
      const buffers = [...inputs.cache.buffers, ...section.buffers, ...kept.buffers, squares]
      return native().fidelity(inputs.model, inputs.cache.numbers, section.numbers, ahead, kept.numbers, [squares, progress, flag, ...buffers])
    })
    // Where one fails the other still reads what it was given.
    await Promise.allSettled(running)
    const [observed, later] = await Promise.all(running)
    const layers = Array.from({ length: state.layers }, (_, i) => errors(observed!.subarray(2 * i, 2 * i + 2), later?.subarray(2 * i, 2 * i + 2)))
    return { ...errors(observed!, later), layers }
  })
}

/** Queries for one native call, the last of them `ahead` positions behind the last token read. */
interface Pass {
  readonly ahead: number
  readonly rows: number
  readonly queries: Section
}

function observation(window: Window, model: AttentionModel, state: CacheState): Pass {
  object(window, 'window', 'an object with queries')
  const rows = Math.min(rowsOf(window.queries, 'queries', state), mostRows)
  if (rows < 1) throw new LaproxError('INVALID_ARGUMENT', 'queries have 0 rows; expected the last queries of each sequence')
  return { ahead: 0, rows, queries: queriesSection(window, 'queries', rows, model, state) }
}

function continuation(later: LaterQueries, model: AttentionModel, state: CacheState): Pass {
  const at = 'options.later.queries'
  object(later, 'options.later', 'an object with queries')
  const { queries } = later
  const rows = rowsOf(queries, at, state)
  if (rows < 1 || rows > mostRows) throw new LaproxError('INVALID_ARGUMENT', `${at} have ${rows} rows; expected the next 1 to ${mostRows} queries`)
  return { ahead: rows, rows, queries: queriesSection({ queries }, at, rows, model, state) }
}

function errors(observed: Float64Array, later: Float64Array | undefined): RelativeErrors {
  return later === undefined ? { window: relative(observed) } : { window: relative(observed), later: relative(later) }
}

/** Of squared norms, pairs of what keeping changes and of the outputs. */
function relative(squares: Float64Array): number {
  let change = 0
  let output = 0
  for (let i = 0; i < squares.length; i += 2) {
    change += squares[i]!
    output += squares[i + 1]!
  }
  return change === 0 ? 0 : Math.sqrt(change / output)
}
