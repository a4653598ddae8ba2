import { type Integers, integers } from '../cache.js'
import { allocate, integer } from '../check.js'
import { LaproxError } from '../errors.js'
import type { Policy } from '../policy.js'
import type { Scores, Shape } from '../score.js'

/** Which entries a cache had, as a report is told. */
export interface EntriesDescription {
  readonly lengths?: number | Integers | undefined
  readonly positions?: Int32Array | undefined
  readonly contextLengths?: Integers | undefined
  readonly scores?: Scores | undefined
}

/** The entries that a cache had before an eviction: their segments, and the position of each. */
export class Entries implements Shape {
  readonly layers: number
  readonly sequences: number
  readonly kvHeads: number
  /** [segments] */
  readonly lengths: Int32Array
  /** [segments + 1] where each segment begins in arrays of all entries. */
  readonly offsets: Float64Array
  /** Of all entries; undefined: the index in the segment. */
  readonly positions: Int32Array | undefined
  /** [sequences] the positions that each sequence has. */
  readonly contexts: Int32Array

  /** @throws LaproxError `INVALID_ARGUMENT` for what does not fit the shape or together */
  constructor(shape: Shape, { scores, ...given }: EntriesDescription) {
    this.layers = shape.layers
    this.sequences = shape.sequences
    this.kvHeads = shape.kvHeads
    const segments = this.layers * this.sequences * this.kvHeads
    const lengths = given.lengths ?? scores?.lengths
    if (lengths === undefined) {
      throw new LaproxError('INVALID_ARGUMENT', 'lengths is missing; expected the entries that each segment had, since there are no scores')
    }
    this.lengths =
      typeof lengths === 'number'
        ? new Int32Array(segments).fill(integer(lengths, 'lengths', 0))
        : exactly(integers(lengths, 'lengths'), 'lengths', segments, 'segment')
    this.offsets = allocate(Float64Array, segments + 1, 'the offsets of the segments')
    for (const [x, length] of this.lengths.entries()) this.offsets[x + 1] = this.offsets[x]! + length
    if (scores !== undefined) this.#match(scores)

    this.positions = given.positions ?? scores?.positions
    if (this.positions !== undefined) exactly(this.positions, 'positions', this.offsets[segments]!, 'entry')
    const contexts = given.contextLengths ?? scores?.contextLengths
    if (contexts !== undefined) this.contexts = exactly(integers(contexts, 'contextLengths'), 'contextLengths', this.sequences, 'sequence')
    else if (this.positions === undefined) this.contexts = this.#longest()
    else
      throw new LaproxError(
        'INVALID_ARGUMENT',
        'contextLengths is missing; expected the tokens that each sequence had read, since there are positions',
      )
  }

  #match(scores: Scores): void {
    for (const name of ['layers', 'sequences', 'kvHeads'] as const) {
      if (scores[name] !== this[name]) {
        throw new LaproxError('INVALID_ARGUMENT', `scores: ${name} is ${scores[name]}; expected that of the selection, ${this[name]}`)
      }
    }
    const x = this.lengths.findIndex((length, i) => length !== scores.lengths[i])
    if (x >= 0) {
      throw new LaproxError('INVALID_ARGUMENT', `lengths[${x}] is ${this.lengths[x]}; expected as many as there are scores, ${scores.lengths[x]}`)
    }
  }

  #longest(): Int32Array {
    const longest = new Int32Array(this.sequences)
    for (const [x, length] of this.lengths.entries()) {
      const sequence = this.sequenceOf(x)
      longest[sequence] = Math.max(longest[sequence]!, length)
    }
    return longest
  }

  sequenceOf(segment: number): number {
    return Math.floor(segment / this.kvHeads) % this.sequences
  }

  /** As error messages name it. */
  nameOf(segment: number): string {
    const layer = Math.floor(segment / this.kvHeads / this.sequences)
    return `(layer ${layer}, sequence ${this.sequenceOf(segment)}, head ${segment % this.kvHeads})`
  }

  /** The positions of a segment's entries; undefined: 0, 1, 2, ... */
  positionsOf(segment: number): Int32Array | undefined {
    return this.positions?.subarray(this.offsets[segment]!, this.offsets[segment + 1]!)
  }

  /** Marks the entries of a segment that a policy keeps outside the ranking, [length] zeros and ones. */
  markProtected({ sinks, recent, pinned }: Policy, segment: number): Uint8Array {
    const length = this.lengths[segment]!
    const positions = this.positionsOf(segment)
    const context = positions === undefined ? length : this.contexts[this.sequenceOf(segment)]!
    const marks = new Uint8Array(length)
    for (const [begin, end] of [[0, sinks], [Math.max(0, context - recent), context], ...pinned] as [number, number][]) {
      marks.fill(1, firstFrom(positions, begin, length), firstFrom(positions, end, length))
    }
    return marks
  }
}

/** The first entry at a position or after it. */
function firstFrom(positions: Int32Array | undefined, position: number, length: number): number {
  if (positions === undefined) return Math.min(position, length)
  let [low, high] = [0, length]
  while (low < high) {
    const middle = (low + high) >>> 1
    if (positions[middle]! < position) low = middle + 1
    else high = middle
  }
  return low
}

function exactly<T extends Int32Array>(list: T, at: string, count: number, each: string): T {
  if (list instanceof Int32Array && list.length === count) return list
  throw new LaproxError('INVALID_ARGUMENT', `${at} has ${list?.length} numbers; expected one per ${each}, ${count}`)
}
