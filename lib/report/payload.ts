/** One name and what it is, as a row of a table. */
export type Row = readonly [name: string, value: string]

/** One number at the top of the page. */
export interface Figure {
  readonly name: string
  readonly value: string
  /** What it is made of, in small print. */
  readonly note: string
}

/** How the scores that were ranked are distributed: pooled, without protected and non-finite ones. */
export interface Distribution {
  /** Logarithmic, unless a score is negative. */
  readonly scale: 'log' | 'linear'
  /** [bins + 1] ascending; the last bin includes its end. */
  readonly edges: readonly number[]
  /** [bins] entries in each. */
  readonly kept: readonly number[]
  readonly dropped: readonly number[]
  /** Entries that a logarithmic axis has no place for: scores of zero, and scores below its first edge. */
  readonly zero: readonly [kept: number, dropped: number]
  readonly below: readonly [kept: number, dropped: number]
  /** Entries outside the ranking. */
  readonly protected: number
  readonly nonFinite: number
  /** What has one threshold: each sequence, each layer of one, or each head. */
  readonly part: 'sequence' | 'layer' | 'head'
  /** Of each part the smallest kept score that no dropped one exceeds; parts that keep everything have none. */
  readonly thresholds: readonly number[]
  /** Kept entries with a smaller score than a dropped one of their part: by floors, where the policy has any. */
  readonly underThreshold: number
  readonly floors: boolean
}

/** ||O_kept - O|| / ||O|| of outputs O; null: infinite, where O is zero. */
export interface RelativeErrors {
  readonly window: number | null
  readonly later?: number | null
}

/** The errors over all layers together, and of each. */
export interface Errors extends RelativeErrors {
  readonly layers: readonly RelativeErrors[]
}

/**
 * What the page of a report is given: plain data that is shown as it is, and counts of kept entries. Both sides of the page, Node and
 * the browser, read this file: it imports nothing. A *segment* is one (layer, sequence, KV head), numbered
 * (layer * sequences + sequence) * kvHeads + head.
 */
export interface Payload {
  readonly title: string
  readonly policy: string
  readonly figures: readonly Figure[]
  readonly layers: number
  readonly sequences: number
  readonly kvHeads: number
  /** [sequences] positions of each. */
  readonly contexts: readonly number[]
  /** [segments] entries there were, and entries kept. */
  readonly lengths: readonly number[]
  readonly counts: readonly number[]
  /** Positions that one count of {@link Packed.kept} stands for; 1: they are bits. */
  readonly bin: number
  readonly distribution?: Distribution
  readonly fidelity?: Errors
  /** Texts of the first tokens. */
  readonly tokens?: readonly string[]
  readonly tables: readonly { readonly name: string; readonly rows: readonly Row[] }[]
  /** Sentences: what was too large for the page. */
  readonly thinned: readonly string[]
}

/** A payload and its arrays. */
export interface Packed {
  readonly payload: Payload
  /**
   * Which entries are kept, a row a segment, rows of equal length: bit p % 32 of word floor(p / 32) is that of position p; or, with
   * bins, word floor(p / bin) counts those of a bin.
   */
  readonly kept: Uint32Array
  /** Which entries there were, likewise, where that is not simply the first `lengths` positions; else empty. */
  readonly present: Uint32Array
}

/** Words of a segment's row: of the longest sequence. */
export function rowWords(contexts: readonly number[], bin: number): number {
  return Math.ceil(Math.max(...contexts, 1) / (bin === 1 ? 32 : bin))
}

/** Bytes of the JSON, of `kept` and of `present`; then the three, the JSON padded to whole words. Little-endian. */
export function pack({ payload, kept, present }: Packed): Uint8Array {
  const json = new TextEncoder().encode(JSON.stringify(payload))
  const begin = 12 + Math.ceil(json.length / 4) * 4
  const bytes = new Uint8Array(begin + kept.byteLength + present.byteLength)
  new Uint32Array(bytes.buffer, 0, 3).set([json.length, kept.byteLength, present.byteLength])
  bytes.set(json, 12)
  const words = new Uint32Array(bytes.buffer, begin)
  words.set(kept)
  words.set(present, kept.length)
  return bytes
}

/** The inverse of {@link pack}; the arrays are views. */
export function unpack(buffer: ArrayBuffer): Packed {
  const [jsonBytes, keptBytes, presentBytes] = new Uint32Array(buffer, 0, 3) as unknown as [number, number, number]
  const payload: Payload = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 12, jsonBytes)))
  const begin = 12 + Math.ceil(jsonBytes / 4) * 4
  return {
    payload,
    kept: new Uint32Array(buffer, begin, keptBytes / 4),
    present: new Uint32Array(buffer, begin + keptBytes, presentBytes / 4),
  }
}
