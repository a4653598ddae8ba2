import type { Policy, Pooling } from '../policy.js'
import type { Scores } from '../score.js'
import type { Selection } from '../selection.js'
import type { Entries } from './entries.js'
import { pacer } from './pace.js'
import type { Distribution } from './payload.js'

/** Tokens that are looked at without a pause. */
const piece = 2 ** 15

/**
 * How the ranked scores are distributed, and where the thresholds lie. The ranking compares pooled scores within what shares a budget,
 * its *part*: the threshold of a part is its smallest kept score that no dropped one exceeds. A policy with floors also keeps entries
 * below it. The event loop turns meanwhile.
 */
export async function distributionOf(entries: Entries, scores: Scores, selection: Selection, policy: Policy): Promise<Distribution> {
  const { tokens, offsets: keptOffsets } = selection
  const parts = partsOf(entries, policy)
  const histogram = new FineHistogram()
  const largestDropped = new Float64Array(parts.count).fill(Number.NEGATIVE_INFINITY)
  /** Of each kept entry, NaN where it was not ranked. */
  const keptScores = new Float32Array(tokens.length).fill(Number.NaN)
  const apart = { protected: 0, nonFinite: 0 }
  const pace = pacer()
  for (let x = 0; x < entries.lengths.length; x++) {
    const own = scores.data.subarray(entries.offsets[x], entries.offsets[x + 1])
    const isProtected = entries.markProtected(policy, x)
    const end = keptOffsets[x + 1]!
    let [next, largest] = [keptOffsets[x]!, Number.NEGATIVE_INFINITY]
    for (let begin = 0; begin < own.length; begin += piece) {
      const pooled = pool(own, begin, Math.min(own.length, begin + piece), policy.pooling)
      for (let i = 0; i < pooled.length; i++) {
        const token = begin + i
        const score = pooled[i]!
        const kept = next < end && tokens[next] === token
        if (kept) next++
        if (isProtected[token] === 1) apart.protected++
        else if (!Number.isFinite(own[token]!)) apart.nonFinite++
        else {
          histogram.add(score, kept)
          if (kept) keptScores[next - 1] = score
          else if (score > largest) largest = score
        }
      }
      await pace()
    }
    const part = parts.of(x)
    if (largest > largestDropped[part]!) largestDropped[part] = largest
  }

  const thresholds = new Float64Array(parts.count).fill(Number.POSITIVE_INFINITY)
  let underThreshold = 0
  for (let x = 0; x < entries.lengths.length; x++) {
    const part = parts.of(x)
    for (let i = keptOffsets[x]!; i < keptOffsets[x + 1]!; i++) {
      const score = keptScores[i]!
      if (score < largestDropped[part]!) underThreshold++
      else if (score < thresholds[part]!) thresholds[part] = score
    }
    await pace()
  }
  const found = [...thresholds].filter((threshold, part) => threshold < Number.POSITIVE_INFINITY && largestDropped[part]! > Number.NEGATIVE_INFINITY)
  return {
    ...histogram.result(found.length === 1 ? found[0] : undefined),
    ...apart,
    part: parts.name,
    thresholds: found,
    underThreshold,
    floors: policy.floor > 0,
  }
}

/** What shares a budget, and which a segment belongs to. */
function partsOf(
  { layers, sequences, kvHeads }: Entries,
  { scope }: Policy,
): { name: Distribution['part']; count: number; of(segment: number): number } {
  switch (scope) {
    case 'model':
      return { name: 'sequence', count: sequences, of: (segment) => Math.floor(segment / kvHeads) % sequences }
    case 'layer':
      return { name: 'layer', count: layers * sequences, of: (segment) => Math.floor(segment / kvHeads) }
    case 'head':
      return { name: 'head', count: layers * sequences * kvHeads, of: (segment) => segment }
  }
}

/** Pooled scores of the tokens from `begin` to `end` of a segment, as the ranking makes them: what is not finite is no neighbour. */
export function pool(scores: Float32Array, begin: number, end: number, pooling: Pooling): Float32Array {
  if (pooling.kind === 'none') return scores.subarray(begin, end)
  const { kind, width } = pooling
  const reach = (width - 1) / 2
  return kind === 'max' ? largestAround(scores, begin, end, reach) : meanAround(scores, begin, end, reach)
}

/** Maxima of 1, 2, 4, ... tokens, each from two of those before, until two of them cover the neighbours. */
function largestAround(scores: Float32Array, begin: number, end: number, reach: number): Float32Array {
  const width = 2 * reach + 1
  const largest = new Float32Array(end - begin + 2 * reach).fill(Number.NEGATIVE_INFINITY)
  const first = Math.max(0, begin - reach)
  const last = Math.min(scores.length, end + reach)
  for (let i = first, to = first - begin + reach; i < last; i++, to++) if (Number.isFinite(scores[i]!)) largest[to] = scores[i]!
  const join = (distance: number) => {
    for (let i = 0; i + distance < largest.length; i++) if (largest[i + distance]! > largest[i]!) largest[i] = largest[i + distance]!
  }
  let span = 1
  for (; 2 * span <= width; span *= 2) join(span)
  join(width - span)
  return largest.subarray(0, end - begin)
}

/** In float32, one neighbour after the other. */
function meanAround(scores: Float32Array, begin: number, end: number, reach: number): Float32Array {
  const means = new Float32Array(end - begin)
  for (let token = begin; token < end; token++) {
    const last = Math.min(scores.length - 1, token + reach)
    let [sum, count] = [0, 0]
    for (let i = Math.max(0, token - reach); i <= last; i++) {
      const score = scores[i]!
      if (!Number.isFinite(score)) continue
      sum = Math.fround(sum + score)
      count++
    }
    means[token - begin] = sum / count
  }
  return means
}

/** Moves the nearest of ascending numbers, but for the first and the last, to `to`. */
function moveNearest(numbers: number[], to: number): void {
  const distance = (i: number) => Math.abs(numbers[i]! - to)
  let nearest = 1
  for (let i = 2; i < numbers.length - 1; i++) if (distance(i) < distance(nearest)) nearest = i
  if (numbers[0]! < to && to < numbers.at(-1)!) numbers[nearest] = to
}

/** Bins of the picture. */
const bins = 72

/** A logarithmic axis goes down to this share of the largest score at most. */
const leastShare = 1e-12

/** Of float32; below it are numbers of fewer bits, and few of them. */
const smallestNormal = 2 ** -126

/** Bits of a float32 that a fine bin does not tell apart: 2048 bins between a number and its double. */
const coarse = 12

/**
 * Counts float32 numbers before their range is known: by their upper bits, which ascend as they do. The bins of the picture are made
 * of whole fine bins, so their counts are exact, and their edges off the even ones by 0.05 % at most.
 */
class FineHistogram {
  readonly #value = new Float32Array(1)
  readonly #bits = new Uint32Array(this.#value.buffer)
  readonly #kept = new Uint32Array(2 ** (32 - coarse))
  readonly #dropped = new Uint32Array(2 ** (32 - coarse))
  readonly #zero: [kept: number, dropped: number] = [0, 0]
  #least = Number.POSITIVE_INFINITY
  #leastPositive = Number.POSITIVE_INFINITY
  #most = Number.NEGATIVE_INFINITY

  add(value: number, kept: boolean): void {
    if (value < this.#least) this.#least = value
    if (value > this.#most) this.#most = value
    if (value > 0 && value < this.#leastPositive) this.#leastPositive = value
    if (value === 0) this.#zero[kept ? 0 : 1]++
    ;(kept ? this.#kept : this.#dropped)[this.#binOf(value)]!++
  }

  /** Negative numbers descend by their bits. */
  #binOf(value: number): number {
    this.#value[0] = value === 0 ? 0 : value
    const bits = this.#bits[0]!
    return (bits & 0x80000000 ? ~bits >>> coarse : (bits | 0x80000000) >>> coarse) >>> 0
  }

  /** The smallest number of a fine bin. */
  #startOf(bin: number): number {
    const ordered = bin * 2 ** coarse
    this.#bits[0] = ordered >= 2 ** 31 ? ordered - 2 ** 31 : ~ordered
    return this.#value[0]!
  }

  /** @param edge a number near which a bin is to end, so that it separates what it separates in the picture, too */
  result(edge?: number): Pick<Distribution, 'scale' | 'edges' | 'kept' | 'dropped' | 'zero' | 'below'> {
    const scale = this.#least < 0 ? 'linear' : 'log'
    const [least, most] = scale === 'linear' ? [this.#least, this.#most] : this.#logarithmicRange()
    const even = (share: number) => (scale === 'linear' ? least + share * (most - least) : least * (most / least) ** share)
    const starts = Array.from({ length: bins }, (_, i) => this.#binOf(even(i / bins)))
    starts.push(this.#binOf(most) + 1)
    if (edge !== undefined) moveNearest(starts, this.#binOf(edge))
    const unique = starts.filter((start, i) => i === 0 || start > starts[i - 1]!)
    const ranges = unique.slice(1).map((end, i) => [unique[i]!, end] as const)
    const sums = (counts: Uint32Array, from: number, to: number) => counts.subarray(from, to).reduce((sum, count) => sum + count, 0)
    const [keptZero, droppedZero] = scale === 'linear' ? [0, 0] : this.#zero
    const first = scale === 'linear' ? unique[0]! : this.#binOf(0)
    return {
      scale,
      edges: unique.map((start) => this.#startOf(start)),
      kept: ranges.map((range) => sums(this.#kept, ...range)),
      dropped: ranges.map((range) => sums(this.#dropped, ...range)),
      zero: [keptZero, droppedZero],
      below: [sums(this.#kept, first, unique[0]!) - keptZero, sums(this.#dropped, first, unique[0]!) - droppedZero],
    }
  }

  /** From the smallest positive score to the largest, within limits; where there is none, any range. */
  #logarithmicRange(): [least: number, most: number] {
    const most = this.#most >= smallestNormal ? this.#most : 1
    return [Math.min(most, Math.max(this.#leastPositive, most * leastShare, smallestNormal)), most]
  }
}
