import { expect, it } from 'vitest'
import { type Policy, policies, Scores, select } from '../../lib/index.js'
import { Random } from '../support/random.js'
import { cpu, device, onGpu } from './gpu.js'

/** Scores of a kind: many ties, skewed, narrow, all equal, all zero, negative; around both zeros and at the ends of float32. */
const KINDS = ['random', 'ties', 'skewed', 'narrow', 'equal', 'zero', 'negative', 'extreme'] as const

function draw(random: Random, kind: (typeof KINDS)[number]): number {
  switch (kind) {
    case 'random':
      return random.next() ** 4
    case 'ties':
      return random.integer(0, 3)
    case 'skewed':
      return Math.exp(20 * random.normal())
    case 'narrow':
      return 1 + random.integer(0, 40) * 2 ** -23
    case 'equal':
      return 0.7
    case 'zero':
      return 0
    case 'negative':
      return -random.next()
    case 'extreme': {
      const size = [0, random.integer(1, 3) * 2 ** -149, 3e38][random.integer(0, 2)] as number
      return random.chance(0.5) ? size : -size
    }
  }
}

interface Given {
  readonly layers: number
  readonly sequences: number
  readonly kvHeads: number
  readonly most: number
  readonly positions?: boolean
}

function makeScores(seed: number, kind: (typeof KINDS)[number], { layers, sequences, kvHeads, most, positions = false }: Given): Scores {
  const random = new Random(seed)
  const lengths = Array.from({ length: layers * sequences * kvHeads }, () => (random.chance(0.1) ? 0 : random.integer(1, most)))
  const data = Float32Array.from({ length: lengths.reduce((a, b) => a + b, 0) }, () => draw(random, kind))
  const contexts = Array.from({ length: sequences }, () => 2 * most)
  return Scores.from({
    layers,
    sequences,
    kvHeads,
    lengths,
    data,
    bytesPerEntry: 512,
    ...(positions ? { positions: Int32Array.from(lengths.flatMap((n) => random.subset(2 * most, n))), contextLengths: contexts } : {}),
  })
}

const base = policies.laprox({ keep: 0.3, sinks: 0, recent: 0 })
const VARIANTS: Partial<Policy>[] = [
  {},
  { pooling: { kind: 'none' } },
  { pooling: { kind: 'max', width: 31 } },
  { pooling: { kind: 'max', width: 255 } },
  { pooling: { kind: 'mean', width: 5 } },
  { pooling: { kind: 'mean', width: 21 } },
  { scope: 'layer' },
  { scope: 'head' },
  { floor: 0.2 },
  { floor: 1 },
  { scope: 'layer', floor: 0.5, pooling: { kind: 'none' } },
  { scope: 'head', pyramidBeta: 20 },
  { scope: 'head', pyramidBeta: 20, budget: { entries: 300 } },
  { sinks: 4, recent: 32 },
  {
    sinks: 1,
    recent: 5,
    pinned: [
      [20, 30],
      [25, 40],
      [7, 7],
    ],
  },
  { budget: { entries: 500 } },
  { scope: 'layer', budget: { entries: 101 } },
  { scope: 'head', budget: { bytes: 512 * 333 } },
  { budget: { ratio: 0.01 } },
  { budget: { ratio: 0.97 } },
  { budget: { ratio: 1 } },
  { budget: { entries: 0 } },
]

/** What a selection ends in: its tokens and counts, or a code. */
async function outcome(scores: Scores, policy: Policy, on: typeof cpu): Promise<unknown> {
  try {
    const selection = await select(scores, policy, { device: on })
    const { tokens, offsets, report } = await selection.to('cpu')
    const { entries, kept, protectedEntries, nonFinite } = report
    selection.dispose()
    return { tokens, offsets, entries, kept, protectedEntries, nonFinite }
  } catch (error) {
    return (error as { code: string }).code
  }
}

async function expectSame(scores: Scores, variants: readonly Partial<Policy>[]): Promise<void> {
  const there = await scores.to(device)
  for (const variant of variants) {
    const policy = { ...base, ...variant }
    expect(await outcome(there, policy, device), JSON.stringify(variant)).toEqual(await outcome(scores, policy, cpu))
  }
  there.dispose()
}

onGpu('a selection of given scores', () => {
  it.each(KINDS)('is that of the CPU: %s', async (kind) => {
    for (const [seed, given] of [
      { layers: 3, sequences: 2, kvHeads: 2, most: 700 },
      { layers: 2, sequences: 1, kvHeads: 3, most: 90, positions: true },
      { layers: 1, sequences: 3, kvHeads: 1, most: 5 },
    ].entries()) {
      await expectSame(makeScores(seed, kind, given), VARIANTS)
    }
  })

  it('is that of the CPU for long segments', async () => {
    for (const kind of ['random', 'ties', 'narrow'] as const) {
      await expectSame(makeScores(7, kind, { layers: 4, sequences: 1, kvHeads: 4, most: 40_000 }), [
        {},
        { scope: 'head' },
        { scope: 'layer', floor: 0.2 },
      ])
    }
  })

  it('refuses and keeps scores that are not finite', async () => {
    const scores = makeScores(1, 'random', { layers: 2, sequences: 1, kvHeads: 2, most: 300 })
    scores.data[17] = Number.NaN
    scores.data[100] = Number.POSITIVE_INFINITY
    scores.data[101] = Number.NEGATIVE_INFINITY
    await expectSame(scores, [{}, { nonFinite: 'keep' }, { nonFinite: 'keep', pooling: { kind: 'none' } }, { nonFinite: 'keep', scope: 'head' }])
  })

  it('is the same bits in 20 runs', async () => {
    const scores = await makeScores(3, 'ties', { layers: 3, sequences: 2, kvHeads: 2, most: 3000 }).to(device)
    const first = await outcome(scores, base, device)
    for (let run = 0; run < 20; run++) expect(await outcome(scores, base, device)).toEqual(first)
    scores.dispose()
  })

  it('refuses a budget below what is protected, with numbers', async () => {
    const scores = makeScores(4, 'random', { layers: 2, sequences: 1, kvHeads: 2, most: 300 })
    const policy = policies.laprox({ keep: 0.01, recent: 64 })
    await expect(select(await scores.to(device), policy)).rejects.toThrow(/the budget of sequence 0 is \d+ of \d+ entries, but \d+ are protected/)
    const positioned = makeScores(5, 'random', { layers: 2, sequences: 1, kvHeads: 2, most: 300, positions: true })
    await expect(select(await positioned.to(device), policies.laprox({ keep: 0.01, sinks: 300, recent: 300 }))).rejects.toMatchObject({
      code: 'BUDGET_TOO_SMALL',
      message: expect.stringMatching(/^the budget of \d+ of \d+ entries is below what is protected/),
    })
  })
})
