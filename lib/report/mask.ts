import { allocate } from '../check.js'
import { LaproxError } from '../errors.js'
import type { Selection } from '../selection.js'
import type { Entries } from './entries.js'
import { pacer } from './pace.js'
import { type Packed, rowWords } from './payload.js'

/** Bits that a page may hold: 32 MiB, and as much again to count them quickly. A gigabyte of them opens no browser. */
const maxBits = 2 ** 28

/** Counts that a page may hold where there are more positions than bits. */
const maxCounts = 2 ** 22

/** How many positions of all segments are to share a count, or 1 where each can have its bit. */
export function binOf({ lengths, contexts }: Entries): number {
  const fits = (bin: number, most: number) => lengths.length * rowWords([...contexts], bin) <= most
  if (fits(1, maxBits / 32)) return 1
  let bin = 64
  while (!fits(bin, maxCounts) && bin < 2 ** 31) bin *= 2
  return bin
}

/**
 * Marks what was kept, and where positions are given also what there was, a row a segment: see {@link Packed}.
 *
 * @throws LaproxError `INVALID_ARGUMENT`, `OUT_OF_BOUNDS` for tokens or positions that cannot be
 */
export async function markEntries(entries: Entries, selection: Selection, bin: number): Promise<Omit<Packed, 'payload'>> {
  const { lengths, offsets, positions } = entries
  const words = rowWords([...entries.contexts], bin)
  const room = () => allocate(Uint32Array, lengths.length * words, 'the kept entries')
  const [kept, present] = [room(), positions === undefined ? new Uint32Array(0) : room()]
  const { tokens, offsets: keptOffsets } = selection
  const pace = pacer()
  for (let x = 0; x < lengths.length; x++) {
    const own = entries.positionsOf(x)
    const context = entries.contexts[entries.sequenceOf(x)]!
    const mark = marker(x * words, bin)
    if (own !== undefined) {
      for (let i = 0, before = -1; i < own.length; i++) {
        const position = own[i]!
        if (position <= before || position >= context) {
          throw new LaproxError(
            'OUT_OF_BOUNDS',
            `positions[${offsets[x]! + i}] of ${entries.nameOf(x)} is ${position}; expected ascending positions below ${context}`,
          )
        }
        mark(present, position)
        before = position
      }
      await pace()
    }
    const end = keptOffsets[x + 1]!
    for (let i = keptOffsets[x]!, before = -1; i < end; i++) {
      const token = tokens[i]!
      if (token <= before || token >= lengths[x]!) {
        throw new LaproxError(
          'OUT_OF_BOUNDS',
          `selection keeps token ${token} of ${entries.nameOf(x)}; expected ascending tokens below ${lengths[x]}, its length`,
        )
      }
      mark(kept, own === undefined ? token : own[token]!)
      before = token
    }
    await pace()
  }
  return { kept, present }
}

function marker(row: number, bin: number): (marks: Uint32Array, position: number) => void {
  if (bin === 1) {
    return (marks, position) => {
      marks[row + (position >>> 5)]! |= 1 << (position & 31)
    }
  }
  return (marks, position) => {
    marks[row + Math.floor(position / bin)]! += 1
  }
}
