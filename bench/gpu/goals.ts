import type { Check, Result, Results } from './results.js'

/** The figure that a stage is to reach, for the whole model. */
export interface Goal {
  readonly what: string
  readonly stage: string
  readonly n: number
  readonly limitMs: number
  readonly measuredMs: number | undefined
  readonly met: boolean
}

const model = 'Llama-3.1-8B'

/** Milliseconds at 131,072 tokens. */
const limits: readonly (Partial<Result> & { readonly limit: number; readonly what: string })[] = [
  { stage: 'evict-kept-norms', input: 'peaked', limit: 5, what: 'whole eviction, ‖v‖ kept at append' },
  { stage: 'evict', input: 'peaked', limit: 7.5, what: 'whole eviction, ‖v‖ not kept' },
  { stage: 'evict-given-lse', input: 'peaked', limit: 4.5, what: 'whole eviction, log-sum-exp given, ‖v‖ kept' },
  { stage: 'scan', input: 'peaked', limit: 2.7, what: 'the scan alone' },
  { stage: 'scan', input: 'peaked', kernels: 'portable', limit: 3.8, what: 'the scan alone, portable kernels' },
  { stage: 'score-joint', input: 'peaked', limit: 24, what: 'every exact joint score' },
  { stage: 'evict', input: 'diffuse', limit: 28, what: 'whole eviction of a cache that cannot be pruned' },
  { stage: 'score-snapkv', input: 'peaked', limit: 5.5, what: 'every SnapKV score' },
  { stage: 'score-snapkv-given-lse', input: 'peaked', limit: 2.7, what: 'every SnapKV score, log-sum-exp given' },
  { stage: 'select', input: 'peaked', limit: 0.12, what: 'selection with pooling' },
  { stage: 'compact', keep: 0.05, input: 'peaked', limit: 0.6, what: 'compaction, 5 % kept' },
  { stage: 'compact', keep: 0.5, input: 'peaked', limit: 5, what: 'compaction, half kept' },
]

export function goals({ results }: Results): Goal[] {
  const long = limits.map(({ limit, what, ...wanted }) => goal(results, { ...wanted, n: 131072 }, limit, what))
  const middle = limits
    .filter(({ kernels }) => kernels === undefined)
    .map(({ limit, what, ...wanted }) => goal(results, { ...wanted, n: 32768 }, (limit / 4) * 1.1, what))
  return [...long, ...middle, goal(results, { stage: 'evict-kept-norms', input: 'peaked', n: 8192 }, 0.6, 'whole eviction, ‖v‖ kept at append')]
}

function goal(results: readonly Result[], wanted: Partial<Result>, limitMs: number, what: string): Goal {
  const found = find(results, { model, kernels: undefined, peer: undefined, ...wanted })
  const measuredMs = found && found.medianUs / 1000
  return { what, stage: wanted.stage!, n: wanted.n!, limitMs, measuredMs, met: measuredMs !== undefined && measuredMs <= limitMs }
}

/** The first result that has these properties; undefined: must be absent. */
export function find(results: readonly Result[], wanted: Partial<Record<keyof Result, unknown>>): Result | undefined {
  return results.find((result) => Object.entries(wanted).every(([name, value]) => result[name as keyof Result] === value))
}

/** What is wrong with a check, or undefined. */
export function wrong({ tokensDiffer, partsNotMoved, scoresBeyondBounds }: Check): string | undefined {
  const faults = [
    tokensDiffer > 0 ? `${tokensDiffer} tokens differ from the selection by all scores` : '',
    partsNotMoved > 0 ? `${partsNotMoved} parts of kept rows were not moved` : '',
    scoresBeyondBounds > 0 ? `${scoresBeyondBounds} scores exceed their bounds` : '',
  ].filter((fault) => fault !== '')
  return faults.length === 0 ? undefined : faults.join(', ')
}
