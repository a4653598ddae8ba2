import { type Packed, rowWords } from '../payload.js'
import type { View } from './view.js'

/** Marked positions of segments, counted in constant time between any two. */
export class Marks {
  readonly #words: Uint32Array
  readonly #rowWords: number
  readonly #bin: number
  /** [segments, rowWords + 1] marks before each word of the row. */
  readonly #before: Uint32Array

  /** @param words rows of bits, or of counts of `bin` positions each: see {@link Packed} */
  constructor(words: Uint32Array, rowWords: number, bin: number) {
    this.#words = words
    this.#rowWords = rowWords
    this.#bin = bin
    const rows = words.length / rowWords
    this.#before = new Uint32Array(rows * (rowWords + 1))
    for (let row = 0, from = 0, to = 0; row < rows; row++, to++) {
      let sum = 0
      for (let i = 0; i < rowWords; i++, from++, to++) {
        this.#before[to] = sum
        sum += bin === 1 ? bits(words[from]!) : words[from]!
      }
      this.#before[to] = sum
    }
  }

  /** Marks of a segment at positions below `position`; with bins a multiple of them, or the end of the row. */
  before(segment: number, position: number): number {
    const row = segment * (this.#rowWords + 1)
    if (this.#bin > 1) return this.#before[row + Math.min(Math.ceil(position / this.#bin), this.#rowWords)]!
    const word = position >>> 5
    const rest = position & 31
    const whole = this.#before[row + word]!
    return rest === 0 ? whole : whole + bits(this.#words[segment * this.#rowWords + word]! & ((1 << rest) - 1))
  }

  /** Adds to each of `sums` the marks of a segment from its begin to its end; most begin where the one before ends. */
  add(segment: number, begin: Uint32Array, end: Uint32Array, sums: Uint32Array): void {
    let [at, count] = [-1, 0]
    for (let i = 0; i < sums.length; i++) {
      if (begin[i] !== at) count = this.before(segment, begin[i]!)
      at = end[i]!
      const next = this.before(segment, at)
      sums[i]! += next - count
      count = next
    }
  }

  /** Marks of a segment from one position to another. */
  between(segment: number, begin: number, end: number): number {
    return this.before(segment, end) - this.before(segment, begin)
  }
}

/** Bits that are set. */
function bits(word: number): number {
  let x = word - ((word >>> 1) & 0x55555555)
  x = (x & 0x33333333) + ((x >>> 2) & 0x33333333)
  return Math.imul((x + (x >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24
}

/** What a picture of so many columns and lines shows of a view. */
export interface Cells {
  /** [columns] the positions of each: from `begin` to `end`, at least one. */
  readonly begin: Uint32Array
  readonly end: Uint32Array
  /** Row of the first line, and rows that share a line. */
  readonly firstRow: number
  readonly rowsPerLine: number
  readonly lines: number
  /** [lines, columns] kept share of the entries there were; NaN where there were none. */
  readonly shares: Float32Array
  /** [columns] the same of all lines together. */
  readonly profile: Float32Array
}

/** What lies within a view: positions, the end excluded, and rows. */
export interface Inside {
  readonly begin: number
  readonly end: number
  readonly firstRow: number
  readonly lastRow: number
  readonly kept: number
  readonly present: number
}

/** Which entries there were and which are kept. A *row* is a (layer, head) of one sequence: layer * kvHeads + head. */
export class Kept {
  readonly kvHeads: number
  readonly rows: number
  readonly bin: number
  readonly #sequences: number
  readonly #lengths: readonly number[]
  readonly #kept: Marks
  readonly #present: Marks | undefined

  constructor({ payload, kept, present }: Packed) {
    const { layers, kvHeads, sequences, lengths, contexts, bin } = payload
    this.kvHeads = kvHeads
    this.rows = layers * kvHeads
    this.bin = bin
    this.#sequences = sequences
    this.#lengths = lengths
    const words = rowWords(contexts, bin)
    this.#kept = new Marks(kept, words, bin)
    this.#present = present.length === 0 ? undefined : new Marks(present, words, bin)
  }

  segment(sequence: number, row: number): number {
    const layer = Math.floor(row / this.kvHeads)
    return (layer * this.#sequences + sequence) * this.kvHeads + (row % this.kvHeads)
  }

  /** Kept entries of a row from one position to another. */
  kept(sequence: number, row: number, begin: number, end: number): number {
    return this.#kept.between(this.segment(sequence, row), begin, end)
  }

  /** Entries that there were. */
  present(sequence: number, row: number, begin: number, end: number): number {
    const segment = this.segment(sequence, row)
    if (this.#present !== undefined) return this.#present.between(segment, begin, end)
    const length = this.#lengths[segment]!
    return Math.min(end, length) - Math.min(begin, length)
  }

  /** Of the rows that had a position, the share that keeps it; with bins, of all positions of its bin. */
  shareOfRows(sequence: number, position: number): number {
    const begin = this.#floor(position)
    let [kept, present] = [0, 0]
    for (let row = 0; row < this.rows; row++) {
      kept += this.kept(sequence, row, begin, begin + this.bin)
      present += this.present(sequence, row, begin, begin + this.bin)
    }
    return kept / (present || 1)
  }

  /** Entries of whole positions, or bins, and rows that a view touches. */
  within(sequence: number, { from, to, top, bottom }: View): Inside {
    const [begin, end] = [this.#floor(from), Math.max(Math.ceil(to / this.bin) * this.bin, this.#floor(from) + this.bin)]
    const [firstRow, lastRow] = [Math.floor(top), Math.ceil(bottom) - 1]
    let [kept, present] = [0, 0]
    for (let row = firstRow; row <= lastRow; row++) {
      kept += this.kept(sequence, row, begin, end)
      present += this.present(sequence, row, begin, end)
    }
    return { begin, end, firstRow, lastRow, kept, present }
  }

  /** Counts for a picture: at most `columns` by `lines` shares. */
  cells(sequence: number, { from, to, top, bottom }: View, columns: number, lines: number): Cells {
    const [begin, end] = [new Uint32Array(columns), new Uint32Array(columns)]
    const scale = (to - from) / columns
    for (let i = 0; i < columns; i++) {
      begin[i] = this.#floor(from + i * scale)
      end[i] = Math.max(begin[i]! + this.bin, this.#floor(from + (i + 1) * scale))
    }
    const firstRow = Math.floor(top)
    const count = Math.min(this.rows, Math.ceil(bottom)) - firstRow
    const rowsPerLine = Math.max(1, Math.ceil(count / lines))
    const used = Math.ceil(count / rowsPerLine)
    const shares = new Float32Array(used * columns)
    const [kept, present] = [new Uint32Array(columns), new Uint32Array(columns)]
    const [allKept, allPresent] = [new Float64Array(columns), new Float64Array(columns)]
    for (let line = 0; line < used; line++) {
      kept.fill(0)
      present.fill(0)
      const first = firstRow + line * rowsPerLine
      for (let row = first; row < Math.min(first + rowsPerLine, firstRow + count); row++) this.#add(sequence, row, begin, end, kept, present)
      for (let i = 0; i < columns; i++) {
        shares[line * columns + i] = present[i] === 0 ? Number.NaN : kept[i]! / present[i]!
        allKept[i]! += kept[i]!
        allPresent[i]! += present[i]!
      }
    }
    return { begin, end, firstRow, rowsPerLine, lines: used, shares, profile: Float32Array.from(allKept, (sum, i) => sum / (allPresent[i]! || 1)) }
  }

  #add(sequence: number, row: number, begin: Uint32Array, end: Uint32Array, kept: Uint32Array, present: Uint32Array): void {
    const segment = this.segment(sequence, row)
    this.#kept.add(segment, begin, end, kept)
    if (this.#present !== undefined) {
      this.#present.add(segment, begin, end, present)
      return
    }
    const length = this.#lengths[segment]!
    for (let i = 0; i < present.length; i++) present[i]! += Math.min(end[i]!, length) - Math.min(begin[i]!, length)
  }

  /** A position at which counting can begin. */
  #floor(position: number): number {
    return Math.floor(position / this.bin) * this.bin
  }
}
