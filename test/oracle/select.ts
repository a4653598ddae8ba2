import type { LaproxErrorCode } from '../../lib/errors.js'
import type { Policy } from '../../lib/policy.js'

/**
 * Scores to be ranked. Segments are numbered (layer * sequences + sequence) * kvHeads + head, as everywhere.
 * Selection compares the very numbers it is given: maximum pooling, thresholds and ties are exact, mean pooling is float32.
 */
export interface Ranking {
  readonly layers: number
  readonly sequences: number
  readonly kvHeads: number
  /** One array a segment. */
  readonly scores: readonly ArrayLike<number>[]
  /** Original positions, one array a segment; without them the position of a token is its index. */
  readonly positions?: readonly ArrayLike<number>[]
  /** [sequences] tokens read so far, with positions; without, a segment's length. */
  readonly contextLengths?: ArrayLike<number>
  /** Of one key and one value row. */
  readonly bytesPerEntry: number
}

export interface Choice {
  /** Kept tokens, ascending, one array a segment. */
  readonly kept: number[][]
  readonly protectedEntries: number
  readonly nonFinite: number
}

/** A refusal, with the code that laprox gives it. */
export class Refusal extends Error {
  readonly code: LaproxErrorCode

  constructor(code: LaproxErrorCode, message: string) {
    super(message)
    this.code = code
  }
}

/** One KV head of a sequence, as the ranking sees it. */
interface Head {
  readonly segment: number
  readonly layer: number
  readonly length: number
  readonly pooled: Float64Array
  /** Kept outside the ranking: protected, or not finite. */
  readonly isForced: readonly boolean[]
  readonly protectedCount: number
}

/** Heads that share one budget, in the order of ties: the sequence, a layer of it, or a head of a layer. */
interface Part {
  readonly heads: readonly Head[]
  readonly length: number
  readonly protectedCount: number
  readonly forcedCount: number
}

export function select(ranking: Ranking, policy: Policy): Choice {
  const bySequence = Array.from({ length: ranking.sequences }, (_, sequence) => {
    const parts = partsOf(headsOf(ranking, policy, sequence), policy.scope)
    return { parts, budgets: budgetsOf(parts, ranking, policy) }
  })
  const nonFinite = sum(ranking.scores.map((scores) => Array.from(scores).filter((x) => !Number.isFinite(x)).length))
  if (nonFinite > 0 && policy.nonFinite === 'error') throw new Refusal('NON_FINITE', `${nonFinite} scores are not finite`)

  const kept: number[][] = ranking.scores.map(() => [])
  for (const { parts, budgets } of bySequence) {
    for (const [at, part] of parts.entries()) {
      for (const [segment, token] of selectPart(part, budgets[at]!, policy.floor)) kept[segment]!.push(token)
    }
  }
  for (const tokens of kept) tokens.sort((a, b) => a - b)
  const protectedEntries = sum(bySequence.flatMap(({ parts }) => parts.map((part) => part.protectedCount)))
  return { kept, protectedEntries, nonFinite }
}

function headsOf(ranking: Ranking, policy: Policy, sequence: number): Head[] {
  const heads: Head[] = []
  for (let layer = 0; layer < ranking.layers; layer++) {
    for (let g = 0; g < ranking.kvHeads; g++) {
      const segment = (layer * ranking.sequences + sequence) * ranking.kvHeads + g
      const scores = ranking.scores[segment]!
      const { length } = scores
      const context = ranking.positions === undefined ? length : ranking.contextLengths![sequence]!
      const isProtected = Array.from({ length }, (_, t) => {
        const position = ranking.positions === undefined ? t : ranking.positions[segment]![t]!
        return (
          position < policy.sinks || position >= context - policy.recent || policy.pinned.some(([begin, end]) => position >= begin && position < end)
        )
      })
      heads.push({
        segment,
        layer,
        length,
        pooled: pool(scores, policy.pooling),
        isForced: isProtected.map((flag, t) => flag || !Number.isFinite(scores[t])),
        protectedCount: isProtected.filter((flag) => flag).length,
      })
    }
  }
  return heads
}

/** Scores that are not finite are no neighbours. */
export function pool(scores: ArrayLike<number>, pooling: Policy['pooling']): Float64Array {
  const reach = pooling.kind === 'none' ? 0 : (pooling.width - 1) / 2
  return Float64Array.from({ length: scores.length }, (_, t) => {
    const around: number[] = []
    for (let i = Math.max(0, t - reach); i <= Math.min(scores.length - 1, t + reach); i++) {
      if (Number.isFinite(scores[i])) around.push(scores[i]!)
    }
    if (pooling.kind !== 'mean') return Math.max(...around)
    return Math.fround(around.reduce((sum, x) => Math.fround(sum + x), 0) / around.length)
  })
}

function partsOf(heads: readonly Head[], scope: Policy['scope']): Part[] {
  const groups = new Map<number, Head[]>()
  for (const head of heads) {
    const key = scope === 'model' ? 0 : scope === 'layer' ? head.layer : head.segment
    groups.set(key, [...(groups.get(key) ?? []), head])
  }
  return [...groups.values()].map((members) => ({
    heads: members,
    length: sum(members.map((head) => head.length)),
    protectedCount: sum(members.map((head) => head.protectedCount)),
    forcedCount: sum(members.map((head) => head.isForced.filter((flag) => flag).length)),
  }))
}

/** How many entries each part keeps. */
function budgetsOf(parts: readonly Part[], ranking: Ranking, policy: Policy): number[] {
  const even = evenBudgets(parts, ranking, policy.budget)
  for (const [at, part] of parts.entries()) {
    if (even[at]! < part.protectedCount) {
      throw new Refusal('BUDGET_TOO_SMALL', `the budget is ${even[at]} entries, but ${part.protectedCount} are protected`)
    }
  }
  return policy.pyramidBeta !== undefined && policy.pyramidBeta > 0 && policy.scope === 'head'
    ? pyramid(parts, even, ranking.layers, policy.pyramidBeta)
    : even
}

/**
 * Ratio: the floor of it, of each part. Entries and bytes: of the sequence, shared by length; the remainder goes to the
 * largest fractions, then to the earlier parts. In integers, so that no share is off by a rounding.
 */
function evenBudgets(parts: readonly Part[], ranking: Ranking, budget: Policy['budget']): number[] {
  if ('ratio' in budget) return parts.map((part) => Math.floor(budget.ratio * part.length))
  const total = sum(parts.map((part) => part.length))
  const amount = 'entries' in budget ? budget.entries : Math.floor(budget.bytes / ranking.bytesPerEntry)
  if (amount >= total) return parts.map((part) => part.length)

  const products = parts.map((part) => BigInt(amount) * BigInt(part.length))
  const shares = products.map((product) => Number(product / BigInt(total)))
  const byFraction = products
    .map((product, at) => ({ at, fraction: Number(product % BigInt(total)) }))
    .sort((a, b) => b.fraction - a.fraction || a.at - b.at)
  const missing = amount - sum(shares)
  for (const { at } of byFraction.slice(0, missing)) shares[at] = shares[at]! + 1
  return shares
}

/**
 * PyramidKV: of an unprotected even share u, the first layer gets (2 - 1 / beta) u, the last u / beta, the layers between fall
 * linearly. Quotas are floored; what is then missing to the even total goes one each to the earliest heads with room, and
 * what is too much (layers of unequal length) is taken one each from the latest heads with unprotected entries.
 */
function pyramid(parts: readonly Part[], even: readonly number[], layers: number, beta: number): number[] {
  const quotas = parts.map((part, at) => {
    const depth = layers === 1 ? 0.5 : part.heads[0]!.layer / (layers - 1)
    const factor = 2 - 1 / beta - depth * (2 - 2 / beta)
    return Math.min(part.length, part.protectedCount + Math.floor((even[at]! - part.protectedCount) * factor))
  })
  let missing = sum(even) - sum(quotas)
  while (missing > 0) {
    for (const [at, part] of parts.entries()) {
      if (missing === 0 || quotas[at] === part.length) continue
      quotas[at]! += 1
      missing--
    }
  }
  while (missing < 0) {
    for (const [at, part] of [...parts.entries()].reverse()) {
      if (missing === 0 || quotas[at] === part.protectedCount) continue
      quotas[at]! -= 1
      missing++
    }
  }
  return quotas
}

/** The entries outside the ranking, each head's floor, then the best of the part: [segment, token] pairs. */
function selectPart(part: Part, budget: number, floor: number): [segment: number, token: number][] {
  if (budget < part.forcedCount) {
    throw new Refusal('BUDGET_TOO_SMALL', `the budget is ${budget} entries, but ${part.forcedCount} are protected or not finite`)
  }
  const kept: [number, number][] = []
  const rest: { head: number; token: number; score: number }[] = []
  const floorQuota = Math.floor((floor * (budget - part.forcedCount)) / part.heads.length)
  for (const [at, head] of part.heads.entries()) {
    const candidates: { head: number; token: number; score: number }[] = []
    for (let token = 0; token < head.length; token++) {
      if (head.isForced[token]) kept.push([head.segment, token])
      else candidates.push({ head: at, token, score: head.pooled[token]! })
    }
    candidates.sort(byRank)
    for (const { token } of candidates.slice(0, floorQuota)) kept.push([head.segment, token])
    rest.push(...candidates.slice(floorQuota))
  }
  rest.sort(byRank)
  for (const { head, token } of rest.slice(0, budget - kept.length)) kept.push([part.heads[head]!.segment, token])
  return kept
}

/** The larger score first; of equal ones the smaller (layer, head, token). */
function byRank(a: { head: number; token: number; score: number }, b: { head: number; token: number; score: number }): number {
  if (a.score !== b.score) return a.score > b.score ? -1 : 1
  return a.head - b.head || a.token - b.token
}

function sum(counts: readonly number[]): number {
  return counts.reduce((total, count) => total + count, 0)
}
