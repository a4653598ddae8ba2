import type { KvCache } from './cache.js'
import { type CallOptions, call, type Hooks, part } from './call.js'
import { type Plan, planTarget, prepareOnDevice, startCompact, type Target } from './compact.js'
import { lease } from './device.js'
import { startWork } from './enqueue.js'
import type { AttentionModel } from './model.js'
import { type NativeHandle, native, stage } from './native.js'
import type { Policy } from './policy.js'
import { type ScoreInputs, scoreInputs, sectionOf, startScore } from './score.js'
import { deviceSelection, type Selection, type SelectReport, startSelect, startSelectFrom, tableLength } from './selection.js'
import type { Window } from './window.js'

/** What {@link evict} takes: where the kept rows go, and how scores come about. */
export type EvictOptions = CallOptions &
  Target & {
    /** Compute and rank every exact score, instead of those alone that bounds cannot rule out. The selection is the same. Default false. */
    readonly exhaustive?: boolean | undefined
  }

/** What an eviction did. */
export interface EvictReport extends SelectReport {
  /** Of the keys and values before. */
  readonly bytesBefore: number
  /** Of the keys and values that are left. */
  readonly bytesAfter: number
  /** Milliseconds of moving rows; 0 on a GPU. */
  readonly msCompact: number
}

/** What {@link evict} gives. */
export interface Eviction {
  /** What was kept, ready for the next eviction. */
  readonly cache: KvCache
  /** Which tokens of the old cache that is. */
  readonly selection: Selection
  /** What it took. */
  readonly report: EvictReport
}

/**
 * Scores, selects and compacts in one call: {@link selectFrom}, then {@link compact}. On a GPU all of it is put on the stream at
 * once, and nothing comes back before its end.
 *
 *     const { cache: kept, selection, report } = await evict(model, cache, { queries }, policies.laprox({ keep: 0.05 }))
 *
 * @param window may be null for policies that look at no query
 * @throws LaproxError (as a rejection) what {@link score}, {@link select} and {@link compact} throw. The cache is as it was then.
 */
export async function evict(
  model: AttentionModel,
  cache: KvCache,
  window: Window | null,
  policy: Policy,
  options: EvictOptions = {},
): Promise<Eviction> {
  const inputs = scoreInputs(model, cache, window, policy)
  const plan = planTarget(options, inputs.state, inputs.owner)
  // Several native calls: a disposal of the device in between is to wait for the last.
  const release = lease(inputs.owner)
  try {
    return await call(inputs.owner, options, async (hooks) => {
      if (inputs.owner.backend === 'cuda') return evictOnDevice(inputs, cache, plan, options.exhaustive === true, hooks)
      const { selection, ...scoring } = await choose(inputs, options.exhaustive === true, hooks)
      const { device, state, cache: section } = inputs
      const moved = await startCompact(device, cache, state, section, selection, plan, part(hooks, 0.9, 1))
      const report: EvictReport = Object.freeze({
        ...selection.report,
        ...scoring,
        bytesBefore: cache.bytes,
        bytesAfter: moved.cache.bytes,
        msCompact: moved.ms,
      })
      return { cache: moved.cache, selection, report }
    })
  } finally {
    release()
  }
}

async function choose(
  inputs: ScoreInputs,
  exhaustive: boolean,
  hooks: Hooks,
): Promise<{ selection: Selection; exactScores: number; msScore: number }> {
  if (!exhaustive) {
    const selection = await startSelectFrom(inputs, part(hooks, 0, 0.9))
    const { exactScores, msScore } = selection.report
    return { selection, exactScores, msScore }
  }
  const scores = await startScore(inputs, part(hooks, 0, 0.8))
  const selection = await startSelect(inputs.device, scores, sectionOf(scores), inputs.rules, part(hooks, 0.8, 0.9))
  return { selection, exactScores: scores.data.length, msScore: scores.ms }
}

async function evictOnDevice(inputs: ScoreInputs, cache: KvCache, plan: Plan, exhaustive: boolean, hooks: Hooks): Promise<Eviction> {
  const { owner, device, model, state, cache: section, window, rules } = inputs
  const tokens: NativeHandle = {}
  const scored: NativeHandle | undefined = exhaustive ? {} : undefined
  const table = new Float64Array(tableLength(state.lengths.length))
  const bytesBefore = cache.bytes
  // Where nothing is to be allocated first, the work is handed over before this call returns.
  const preparing = prepareOnDevice(owner, plan, state, undefined, hooks)
  const prepared = preparing instanceof Promise ? await preparing : preparing
  let selection: Selection | undefined
  const result = await prepared.run(cache, async ({ target, rows, pageTable, counts, pages }) => {
    const work = {
      stages: (exhaustive ? stage.score + stage.select : stage.selectCache) + stage.compact,
      model,
      cache: section,
      window,
      scoreRule: rules.score,
      selectRule: rules.select,
      target,
      tokens,
      scored,
      rows,
      pageTable,
      table,
      counts,
      pages,
      keep: [inputs, plan],
    }
    const numbers = await startWork(device, work, hooks)
    const made = deviceSelection(owner, state, table, tokens, numbers)
    selection = made
    return { counts: () => made.counts, numbers }
  })
  if (scored !== undefined) native().freeMemory(scored)
  const { report } = selection!
  return {
    cache: result,
    selection: selection!,
    report: Object.freeze({ ...report, bytesBefore, bytesAfter: result.bytes, msCompact: 0 }),
  }
}
