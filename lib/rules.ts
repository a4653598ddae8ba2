import { type Policy, validatePolicy } from './policy.js'

/** A policy as native code reads it: see `Section` in native.ts. */
export interface Rules {
  readonly policy: Policy
  readonly score: Float64Array
  readonly select: Float64Array
  /** Whether the score looks at queries. */
  readonly needsWindow: boolean
  /** Whether the score reads the output projections themselves, not only their factors. */
  readonly readsProjections: boolean
}

// The enumerators of laprox.h.
const statistics = { joint: 0, bound: 1, removal: 2, factored: 3, 'key-norm': 4, recency: 5, random: 6 }
const attentions = { mean: 0, sum: 1, l2: 2, max: 3, last: 4, none: 5 }
const values = { none: 0, l1: 1, l2: 2, 'projected-l1': 3, 'projected-l2': 4 }
const aggregations = { mean: 0, sum: 1, max: 2, rss: 3 }
const sharings = { group: 0, layer: 1 }
const poolings = { none: 0, max: 1, mean: 2 }
const scopes = { model: 0, layer: 1, head: 2 }
const nonFinites = { error: 0, keep: 1 }

const known = new WeakMap<Policy, Rules>()

/**
 * Checks a policy and translates it; once for each that is frozen.
 *
 * @throws LaproxError `INVALID_ARGUMENT`
 */
export function rulesOf(given: Policy): Rules {
  const policy = validatePolicy(given)
  let rules = known.get(policy)
  if (rules === undefined) {
    rules = translate(policy)
    known.set(policy, rules)
  }
  return rules
}

function translate(policy: Policy): Rules {
  const { score, budget, pooling } = policy
  const weights = policy.layerWeights ?? []
  const factored = score.statistic === 'factored' ? score : undefined
  const [kind, ratio, amount] = 'ratio' in budget ? [0, budget.ratio, 0] : 'entries' in budget ? [1, 0, budget.entries] : [2, 0, budget.bytes]
  return {
    policy,
    score: Float64Array.of(
      0,
      statistics[score.statistic],
      factored === undefined ? 0 : attentions[factored.attention],
      factored === undefined ? 0 : values[factored.value],
      factored === undefined ? 0 : aggregations[factored.aggregation],
      sharings[factored?.sharing ?? 'group'],
      score.statistic === 'random' ? score.seed : 0,
      weights.length,
      ...weights,
    ),
    select: Float64Array.of(
      0,
      poolings[pooling.kind],
      pooling.kind === 'none' ? 0 : pooling.width,
      scopes[policy.scope],
      kind,
      ratio,
      amount,
      policy.floor,
      policy.pyramidBeta ?? 0,
      policy.sinks,
      policy.recent,
      nonFinites[policy.nonFinite],
      policy.pinned.length,
      ...policy.pinned.flat(),
    ),
    readsProjections: factored?.value === 'projected-l1',
    needsWindow: factored === undefined ? ['joint', 'bound', 'removal'].includes(score.statistic) : factored.attention !== 'none',
  }
}

/**
 * An upper bound of what a budget keeps of so many entries, to make room for: at most one entry a segment too large for
 * ratios, exact for the others where no sequence has fewer.
 */
export function mostKept({ budget }: Policy, entries: number, sequences: number, segments: number, bytesPerEntry: number): number {
  if ('ratio' in budget) return Math.min(entries, Math.ceil(budget.ratio * entries) + segments)
  const perSequence = 'entries' in budget ? budget.entries : bytesPerEntry > 0 ? Math.floor(budget.bytes / bytesPerEntry) : entries
  return Math.min(entries, perSequence * sequences)
}
