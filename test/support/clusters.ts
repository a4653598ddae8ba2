import { Selection } from '../../lib/index.js'
import { Random } from './random.js'

export interface Clusters {
  readonly layers: number
  readonly kvHeads: number
  readonly tokens: number
  /** Share that is kept, about. */
  readonly keep: number
}

/**
 * A selection as evictions make them: runs of some seven tokens, the width of the pooling, many at places that most heads like; more
 * in later layers, heads differ; sinks and the last 32 tokens everywhere.
 */
export function clustered({ layers, kvHeads, tokens, keep }: Clusters, seed = 1): Selection {
  const random = new Random(seed)
  const popular = Array.from({ length: Math.ceil(tokens / 100) }, () => random.integer(0, tokens - 1))
  const counts = new Int32Array(layers * kvHeads)
  const kept = new Int32Array(layers * kvHeads * tokens)
  let count = 0
  const marks = new Uint8Array(tokens)
  for (let x = 0; x < counts.length; x++) {
    marks.fill(0)
    marks.fill(1, 0, 4)
    marks.fill(1, Math.max(0, tokens - 32))
    const depth = Math.floor(x / kvHeads) / layers
    let left = tokens * keep * (0.3 + 1.4 * depth) * (0.4 + 1.2 * random.next())
    while (left > 0) {
      const begin = random.chance(0.6)
        ? popular[Math.floor(random.next() ** 2 * popular.length)]! + random.integer(0, 4)
        : random.integer(0, tokens - 1)
      const length = 7 + (random.chance(0.7) ? 0 : random.integer(0, 7))
      marks.fill(1, begin, begin + length)
      left -= length
    }
    const before = count
    for (let token = 0; token < tokens; token++) if (marks[token] === 1) kept[count++] = token
    counts[x] = count - before
  }
  return Selection.from({ layers, kvHeads, counts, tokens: kept.slice(0, count) })
}
