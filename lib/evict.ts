import type { KvCache } from './cache.js'
import { type CallOptions, call, type Hooks } from './call.js'
import { type Plan, planTarget, prepareOnDevice, prepareOnHost, type Target } from './compact.js'
import { lease } from './device.js'
import { startWork } from './enqueue.js'
import type { AttentionModel } from './model.js'
import { type Held, type NativeHandle, native, stage } from './native.js'
import type { Policy } from './policy.js'
import { type ScoreInputs, scoreInputs } from './score.js'
import { deviceSelection, roomFor, type Selection, type SelectReport, selectionOf, tableLength } from './selection.js'
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
 * once, and nothing comes back before its end. Into pages, tables have room for as many as all tokens of a head would take, and are filled with -1:
 * what each head keeps is known too late for narrower ones.
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
  const exhaustive = options.exhaustive === true
  // On a GPU this may be several native calls: a disposal of the device in between is to wait for the last.
  const release = lease(inputs.owner)
  try {
    return await call(inputs.owner, options, (hooks) =>
      inputs.owner.backend === 'cuda' ? evictOnDevice(inputs, cache, plan, exhaustive, hooks) : evictOnHost(inputs, cache, plan, exhaustive, hooks),
    )
  } finally {
    release()
  }
}

async function evictOnHost(inputs: ScoreInputs, cache: KvCache, plan: Plan, exhaustive: boolean, { progress, flag }: Hooks): Promise<Eviction> {
  const { model, state, cache: section, window, rules } = inputs
  const bytesBefore = cache.bytes
  const { memory, tokens } = roomFor(inputs)
  const selection = selectionOf(state, memory)
  const { target, table, pages, finish } = prepareOnHost(cache, plan, state, tokens, state.lengths)
  const held: Held<undefined> = [undefined, progress, flag, ...section.buffers, ...window.buffers, ...target.buffers, memory, table, pages]
  await native().evict(model, section.numbers, window.numbers, rules.score, rules.select, target.numbers, exhaustive, held)
  const kept = finish(selection.counts)
  return {
    cache: kept,
    selection,
    report: Object.freeze({ ...selection.report, bytesBefore, bytesAfter: kept.bytes, msCompact: table[0]! * 1000 }),
  }
}

async function evictOnDevice(inputs: ScoreInputs, cache: KvCache, plan: Plan, exhaustive: boolean, hooks: Hooks): Promise<Eviction> {
  const { owner, device, model, state, cache: section, window, rules } = inputs
  const tokens: NativeHandle = {}
  const table = new Float64Array(tableLength(state.lengths.length))
  const bytesBefore = cache.bytes
  // Where nothing is to be allocated first, the work is handed over before this call returns.
  const preparing = prepareOnDevice(owner, plan, state, undefined, hooks)
  const prepared = preparing instanceof Promise ? await preparing : preparing
  let selection: Selection | undefined
  const result = await prepared.run(cache, async ({ target, rows, pageTable, counts, pages }) => {
    const work = {
      stages: stage.selectCache + stage.compact + (exhaustive ? stage.exhaustive : 0),
      model,
      cache: section,
      window,
      scoreRule: rules.score,
      selectRule: rules.select,
      target,
      tokens,
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
    return { counted: made, numbers }
  })
  const { report } = selection!
  return {
    cache: result,
    selection: selection!,
    report: Object.freeze({ ...report, bytesBefore, bytesAfter: result.bytes, msCompact: 0 }),
  }
}
