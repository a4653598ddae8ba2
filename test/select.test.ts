import fc from 'fast-check'
import { afterAll, describe, expect, it } from 'vitest'
import { Device, type Policy, policies, Scores, type Selection, select } from '../lib/index.js'
import { select as oracleSelect, type Ranking, Refusal } from './oracle/select.js'
import { Random } from './support/random.js'

const device = await Device.open('cpu', { threads: 2 })
afterAll(() => device.dispose())

/** Scores only, nothing protected, model-wide. */
const PLAIN: Policy = {
  name: 'test',
  window: 1,
  score: { statistic: 'joint' },
  pooling: { kind: 'none' },
  scope: 'model',
  budget: { ratio: 0.5 },
  floor: 0,
  sinks: 0,
  recent: 0,
  pinned: [],
  nonFinite: 'error',
}

function scoresOf(ranking: Ranking): Scores {
  const flat = (arrays: readonly ArrayLike<number>[]): number[] => arrays.flatMap((x) => Array.from(x))
  return Scores.from({
    layers: ranking.layers,
    sequences: ranking.sequences,
    kvHeads: ranking.kvHeads,
    lengths: Int32Array.from(ranking.scores, ({ length }) => length),
    data: Float32Array.from(flat(ranking.scores)),
    bytesPerEntry: ranking.bytesPerEntry,
    ...(ranking.positions === undefined
      ? {}
      : { positions: Int32Array.from(flat(ranking.positions)), contextLengths: Int32Array.from(ranking.contextLengths!) }),
  })
}

function keptOf(selection: Selection, ranking: Ranking): number[][] {
  const kept: number[][] = []
  for (let layer = 0; layer < ranking.layers; layer++) {
    for (let sequence = 0; sequence < ranking.sequences; sequence++) {
      for (let head = 0; head < ranking.kvHeads; head++) kept.push([...selection.kept(layer, sequence, head)])
    }
  }
  return kept
}

/** One sequence, one KV head a layer. */
function layersOf(scores: readonly number[][]): Ranking {
  return { layers: scores.length, sequences: 1, kvHeads: 1, scores: scores.map((x) => Float32Array.from(x)), bytesPerEntry: 64 }
}

async function kept(ranking: Ranking, policy: Partial<Policy>, on = device): Promise<number[][]> {
  return keptOf(await select(scoresOf(ranking), { ...PLAIN, ...policy }, { device: on }), ranking)
}

const bytesOf = (tokens: Int32Array): Uint8Array => new Uint8Array(tokens.buffer, tokens.byteOffset, tokens.byteLength)

const POOLINGS: Policy['pooling'][] = [{ kind: 'none' }, ...([1, 3, 7, 21, 255] as const).map((width) => ({ kind: 'max', width }) as const)]

/** Any ranking: few different scores, so that ties abound, or all different; heads of the same or of different lengths. */
const rankings = fc
  .record({
    seed: fc.integer(),
    layers: fc.integer({ min: 1, max: 4 }),
    sequences: fc.integer({ min: 1, max: 3 }),
    kvHeads: fc.integer({ min: 1, max: 4 }),
    most: fc.constantFrom(1, 6, 40, 200),
    levels: fc.constantFrom(1, 2, 5, 1e9),
    negative: fc.boolean(),
    positions: fc.boolean(),
    evenHeads: fc.boolean(),
  })
  .map(({ seed, layers, sequences, kvHeads, most, levels, negative, positions, evenHeads }): Ranking => {
    const random = new Random(seed)
    let length = 0
    const scores = Array.from({ length: layers * sequences * kvHeads }, (_, x) => {
      if (!evenHeads || x % kvHeads === 0) length = random.chance(0.1) ? 0 : random.integer(0, most)
      return Float32Array.from({ length }, () => {
        const level = levels === 1e9 ? random.next() ** 4 : random.integer(0, levels - 1)
        return negative ? -level : level
      })
    })
    const contexts = Array.from({ length: sequences }, () => most + random.integer(0, most))
    const sequenceOf = (x: number): number => Math.floor(x / kvHeads) % sequences
    return {
      layers,
      sequences,
      kvHeads,
      scores,
      bytesPerEntry: random.pick([4, 64, 512]),
      ...(positions ? { positions: scores.map((x, at) => random.subset(contexts[sequenceOf(at)]!, x.length)), contextLengths: contexts } : {}),
    }
  })

const rules = fc.record({
  pooling: fc.constantFrom(...POOLINGS),
  scope: fc.constantFrom('model', 'layer', 'head'),
  budget: fc.oneof(
    fc.record({ ratio: fc.oneof(fc.constantFrom(1, 0.5, 0.05, 0.1), fc.double({ min: 0.001, max: 1, noNaN: true })) }),
    fc.record({ entries: fc.integer({ min: 0, max: 1200 }) }),
    fc.record({ bytes: fc.integer({ min: 0, max: 100_000 }) }),
  ),
  floor: fc.oneof(fc.constantFrom(0, 0.2, 1), fc.double({ min: 0, max: 1, noNaN: true })),
  sinks: fc.constantFrom(0, 0, 1, 4),
  recent: fc.constantFrom(0, 0, 1, 5),
  pinned: fc.array(
    fc.tuple(fc.integer({ min: 0, max: 60 }), fc.integer({ min: 0, max: 9 })).map(([begin, size]) => [begin, begin + size] as const),
    { maxLength: 3 },
  ),
})

function outcome(choose: () => number[][]): number[][] | string {
  try {
    return choose()
  } catch (error) {
    if (error instanceof Refusal) return error.code
    throw error
  }
}

async function outcomeOf(ranking: Ranking, policy: Partial<Policy>): Promise<number[][] | string> {
  return kept(ranking, policy).catch((error: { code: string }) => error.code)
}

const RUNS = { seed: 2605, numRuns: 400, endOnFailure: false }

describe('select', () => {
  it('keeps exactly what the rules say, for any scores and any policy', async () => {
    await fc.assert(
      fc.asyncProperty(rankings, rules, async (ranking, rule) => {
        const policy = { ...PLAIN, ...rule }
        expect(await outcomeOf(ranking, policy)).toEqual(outcome(() => oracleSelect(ranking, policy).kept))
      }),
      { ...RUNS, numRuns: 1000 },
    )
  })

  it('keeps exactly what the rules say under a pyramid', async () => {
    await fc.assert(
      fc.asyncProperty(rankings, rules, fc.constantFrom(1, 1.5, 5, 20, 1e6), async (ranking, rule, pyramidBeta) => {
        const policy = { ...PLAIN, ...rule, scope: 'head', pyramidBeta } as const
        expect(await outcomeOf(ranking, policy)).toEqual(outcome(() => oracleSelect(ranking, policy).kept))
      }),
      RUNS,
    )
  })

  it('keeps floor(ratio * entries) of every part, ascending, protected ones first of all', async () => {
    await fc.assert(
      fc.asyncProperty(rankings, rules, fc.double({ min: 0.01, max: 1, noNaN: true }), async (ranking, rule, ratio) => {
        const policy: Policy = { ...PLAIN, ...rule, budget: { ratio } }
        const chosen = await outcomeOf(ranking, policy)
        if (chosen === 'BUDGET_TOO_SMALL') return
        expect(typeof chosen).not.toBe('string')
        const partOf = (x: number): string => {
          const layer = Math.floor(x / ranking.kvHeads / ranking.sequences)
          const sequence = Math.floor(x / ranking.kvHeads) % ranking.sequences
          return `${sequence} ${policy.scope === 'model' ? '' : layer} ${policy.scope === 'head' ? x : ''}`
        }
        const counts = new Map<string, { entries: number; kept: number }>()
        for (const [x, tokens] of (chosen as number[][]).entries()) {
          const part = counts.get(partOf(x)) ?? { entries: 0, kept: 0 }
          counts.set(partOf(x), { entries: part.entries + ranking.scores[x]!.length, kept: part.kept + tokens.length })
          expect(tokens.every((token, i) => i === 0 || token > tokens[i - 1]!)).toBe(true)
          const { length } = ranking.scores[x]!
          const context = ranking.contextLengths?.[Math.floor(x / ranking.kvHeads) % ranking.sequences] ?? length
          for (let token = 0; token < length; token++) {
            const position = ranking.positions?.[x]?.[token] ?? token
            if (position < policy.sinks || position >= context - policy.recent) expect(tokens).toContain(token)
          }
        }
        for (const part of counts.values()) expect(part.kept).toBe(Math.floor(ratio * part.entries))
      }),
      { ...RUNS, numRuns: 200 },
    )
  })

  it('shares entries by length, the remainder to the largest fractions, then to the earlier part', async () => {
    // 7 of 3 + 3 + 4: shares 2.1, 2.1, 2.8.
    expect(
      await kept(
        layersOf([
          [1, 2, 3],
          [1, 2, 3],
          [1, 2, 3, 4],
        ]),
        { scope: 'layer', budget: { entries: 7 } },
      ),
    ).toEqual([
      [1, 2],
      [1, 2],
      [1, 2, 3],
    ])
    // 4 of 3 + 3 + 3: 1.33 each.
    expect(
      await kept(
        layersOf([
          [1, 2, 3],
          [1, 2, 3],
          [1, 2, 3],
        ]),
        { scope: 'head', budget: { entries: 4 } },
      ),
    ).toEqual([[1, 2], [2], [2]])
  })

  it('turns bytes into whole entries of a key and a value row', async () => {
    const ranking = { ...layersOf([[5, 4, 3, 2, 1]]), bytesPerEntry: 256 }
    expect(await kept(ranking, { budget: { bytes: 3 * 256 + 255 } })).toEqual([[0, 1, 2]])
    expect(await kept(ranking, { budget: { bytes: 1e9 } })).toEqual([[0, 1, 2, 3, 4]])
  })

  it('breaks ties by the smaller layer, then head, then token', async () => {
    const equal: Ranking = { ...layersOf([]), layers: 2, kvHeads: 2, scores: Array.from({ length: 4 }, () => new Float32Array(5)) }
    expect(await kept(equal, { budget: { entries: 12 } })).toEqual([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1], []])
    expect(await kept(equal, { budget: { entries: 7 }, scope: 'layer' })).toEqual([[0, 1, 2, 3], [], [0, 1, 2], []])
  })

  it('holds -0 and +0 for equal', async () => {
    expect(await kept(layersOf([[-0, 0, -0, 0]]), { budget: { entries: 2 } })).toEqual([[0, 1]])
  })

  it('ranks subnormal, huge and negative scores', async () => {
    const scores = [-3e38, -1, -1e-45, 0, 1e-45, 1e-40, 1, 3e38]
    for (let entries = 0; entries <= 8; entries++) {
      expect(await kept(layersOf([scores]), { budget: { entries } })).toEqual([Array.from({ length: entries }, (_, i) => 8 - entries + i)])
    }
  })

  it('keeps everything at ratio 1, nothing of nothing, and nothing at no entries', async () => {
    expect(await kept(layersOf([[1, 2], [], [3]]), { budget: { ratio: 1 } })).toEqual([[0, 1], [], [0]])
    expect(await kept(layersOf([[], []]), { budget: { ratio: 0.3 } })).toEqual([[], []])
    expect(await kept(layersOf([[1, 2, 3]]), { budget: { entries: 0 } })).toEqual([[]])
  })

  it('keeps pinned ranges, overlapping ones and ones beyond the end', async () => {
    const ranking = layersOf([[0, 0, 0, 0, 0, 0, 0, 9, 0, 0]])
    const pinned = [
      [2, 4],
      [3, 5],
      [9, 400],
      [500, 600],
      [1, 1],
    ] as const
    expect(await kept(ranking, { pinned, budget: { entries: 5 } })).toEqual([[2, 3, 4, 7, 9]])
  })

  it('names both numbers where the budget is below what is protected', async () => {
    const ranking = layersOf([Array(20).fill(1)])
    await expect(kept(ranking, { sinks: 4, recent: 3, budget: { entries: 6 } })).rejects.toMatchObject({
      code: 'BUDGET_TOO_SMALL',
      message: expect.stringMatching(/\b6\b.*\b7\b/),
    })
    await expect(kept(ranking, { sinks: 4, recent: 3, budget: { entries: 7 } })).resolves.toEqual([[0, 1, 2, 3, 17, 18, 19]])
  })

  it('gives every head its floor first', async () => {
    const ranking: Ranking = {
      ...layersOf([
        [1, 2, 3, 4],
        [5, 6, 7, 8],
      ]),
      layers: 1,
      kvHeads: 2,
    }
    expect(await kept(ranking, { budget: { entries: 4 }, floor: 0.5 })).toEqual([[3], [1, 2, 3]])
    expect(await kept(ranking, { budget: { entries: 4 }, floor: 1 })).toEqual([
      [2, 3],
      [2, 3],
    ])
  })

  it('pools by the mean in float32, apart from ties within rounding', async () => {
    for (let seed = 0; seed < 40; seed++) {
      const random = new Random(seed)
      const scores = Array.from({ length: 4 }, () => Float32Array.from({ length: random.integer(0, 300) }, () => random.integer(0, 100)))
      const ranking: Ranking = { layers: 2, sequences: 1, kvHeads: 2, scores, bytesPerEntry: 4 }
      // Sums of small integers are exact in any order; only the division rounds.
      const policy: Policy = {
        ...PLAIN,
        pooling: { kind: 'mean', width: random.pick([1, 3, 5, 7, 31]) },
        scope: random.pick(['model', 'layer', 'head']),
      }
      expect(await kept(ranking, policy)).toEqual(oracleSelect(ranking, policy).kept)
    }
  })
})

describe('scores that are not finite', () => {
  const broken = layersOf([[1, Number.NaN, 3, Number.POSITIVE_INFINITY, 5, Number.NEGATIVE_INFINITY, 7, 8]])

  it('are an error by default', async () => {
    await expect(kept(broken, {})).rejects.toMatchObject({ code: 'NON_FINITE' })
    // Protected ones too: pooling looks at them.
    await expect(kept(broken, { pinned: [[0, 7]], budget: { ratio: 1 } })).rejects.toMatchObject({ code: 'NON_FINITE' })
  })

  it('are kept and counted on request', async () => {
    const selection = await select(scoresOf(broken), { ...PLAIN, nonFinite: 'keep', budget: { entries: 4 } }, { device })
    expect(keptOf(selection, broken)).toEqual([[1, 3, 5, 7]])
    expect(selection.report.nonFinite).toBe(3)
  })

  it('do not spread to their neighbours by pooling', async () => {
    const scores = layersOf([[0, 0, Number.NaN, 0, 0, 0, 0, 0, 9, 0, 0]])
    const policy = { nonFinite: 'keep', pooling: { kind: 'max', width: 3 }, budget: { entries: 4 } } as const
    expect(await kept(scores, policy)).toEqual([[2, 7, 8, 9]])
    expect(await kept(scores, { ...policy, pooling: { kind: 'mean', width: 3 } })).toEqual([[2, 7, 8, 9]])
  })

  it('follow the rules among ties and floors', async () => {
    await fc.assert(
      fc.asyncProperty(rankings, rules, fc.integer(), async (ranking, rule, seed) => {
        const random = new Random(seed)
        const sprinkled: Ranking = {
          ...ranking,
          scores: ranking.scores.map((x) =>
            Float32Array.from(x, (score) =>
              random.chance(0.05) ? random.pick([Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]) : score,
            ),
          ),
        }
        const policy: Policy = { ...PLAIN, ...rule, nonFinite: 'keep' }
        expect(await outcomeOf(sprinkled, policy)).toEqual(outcome(() => oracleSelect(sprinkled, policy).kept))
      }),
      RUNS,
    )
  })
})

describe('a selection', () => {
  it('reports what it did', async () => {
    const ranking: Ranking = {
      ...layersOf([
        [1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6],
      ]),
      layers: 2,
    }
    const selection = await select(scoresOf(ranking), { ...PLAIN, sinks: 1 }, { device })
    expect(selection.report).toMatchObject({ entries: 12, kept: 6, protectedEntries: 2, nonFinite: 0, path: 'full' })
    expect(selection.entries).toBe(6)
  })

  it('has the same bits on any number of threads and instructions, for scores with and without ties', async () => {
    const random = new Random(77)
    const scores = Array.from({ length: 6 }, (_, x) =>
      Float32Array.from({ length: 40_000 + 977 * x }, () => (x % 2 === 0 ? random.next() ** 8 : random.integer(0, 3) / 8)),
    )
    const ranking: Ranking = { layers: 3, sequences: 1, kvHeads: 2, scores, bytesPerEntry: 4 }
    const all = scoresOf(ranking)
    const cases = [
      { pooling: { kind: 'none' }, budget: { ratio: 0.3 } },
      { pooling: { kind: 'max', width: 7 }, budget: { ratio: 0.05 }, sinks: 4, recent: 32 },
      { pooling: { kind: 'none' }, scope: 'layer', floor: 0.2, budget: { ratio: 0.3 } },
      { pooling: { kind: 'mean', width: 5 }, scope: 'head', budget: { ratio: 0.9 } },
    ] as const
    const reference: Int32Array[] = []
    for (const options of [{ threads: 1 }, { threads: 2 }, { threads: 7 }, { threads: 2, instructionSet: 'baseline' }] as const) {
      const on = await Device.open('cpu', options)
      for (const [at, policy] of cases.entries()) {
        const { tokens } = await select(all, { ...PLAIN, ...policy }, { device: on })
        reference[at] ??= tokens
        expect(Buffer.compare(bytesOf(tokens), bytesOf(reference[at]!))).toBe(0)
      }
      on.dispose()
    }
    // The first case by a plain sort: everything above the threshold, then ties in order.
    const budget = Math.floor(0.3 * all.data.length)
    const threshold = all.data.slice().sort()[all.data.length - budget]!
    let ties = budget - all.data.filter((score) => score > threshold).length
    const expected = scores.flatMap((segment) =>
      [...segment.keys()].filter((token) => segment[token]! > threshold || (segment[token] === threshold && ties-- > 0)),
    )
    expect(Buffer.compare(bytesOf(reference[0]!), bytesOf(Int32Array.from(expected)))).toBe(0)
  })

  it('of few scores follows the same rules as one of many', async () => {
    const random = new Random(79)
    // On either side of 4096 keys, below which digits are found in another way; of 2048 scores, below which no thread is asked.
    for (const count of [1, 2, 255, 1791, 1793, 4095, 4096, 4097, 5000]) {
      const scattered = Array.from({ length: count }, () => random.normal() * 2 ** random.integer(-100, 100))
      const tied = scattered.map(() => random.integer(0, 3) / 8)
      const close = scattered.map(() => 1 + random.integer(0, 900) * 2 ** -23)
      for (const scores of [scattered, tied, close, Array(count).fill(-0)]) {
        for (const ratio of [0.01, 0.5, 0.99]) {
          const ranking = layersOf([scores])
          expect(await kept(ranking, { budget: { ratio } })).toEqual(oracleSelect(ranking, { ...PLAIN, budget: { ratio } }).kept)
        }
      }
    }
  })

  it('follows every preset', async () => {
    const random = new Random(78)
    const scores = Array.from({ length: 8 }, () => Float32Array.from({ length: 200 }, () => random.next()))
    const ranking: Ranking = { layers: 4, sequences: 1, kvHeads: 2, scores, bytesPerEntry: 4 }
    for (const make of Object.values(policies)) {
      const policy = make({ keep: 0.4 })
      if (policy.pooling.kind === 'mean') continue
      expect(keptOf(await select(scoresOf(ranking), policy, { device }), ranking)).toEqual(oracleSelect(ranking, policy).kept)
    }
  })
})
