import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { gunzipSync } from 'node:zlib'
import type { Browser, Page } from 'puppeteer-core'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { Device, LaproxError, type Policy, type PolicyOptions, policies, policy, Scores, Selection, type SelectReport, select } from '../lib/index.js'
import { distributionOf, pool } from '../lib/report/distribution.js'
import { Entries } from '../lib/report/entries.js'
import { grouped, positions, powerOfTen, relative, short } from '../lib/report/format.js'
import { Kept, Marks } from '../lib/report/page/kept.js'
import { type Distribution, type Packed, pack, unpack } from '../lib/report/payload.js'
import { type ReportContents, writeReport } from '../lib/report/report.js'
import * as oracle from './oracle/select.js'
import { chromium, launchChromium } from './support/chromium.js'
import { clustered } from './support/clusters.js'
import { Random } from './support/random.js'

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'laprox-report-'))
})
afterAll(() => rm(folder, { recursive: true, force: true }))

const target = (name = 'report.html'): string => join(folder, name)

/** A report for a selection that was not made here. */
const reportOf = (selection: Selection, entries: number): SelectReport => ({
  entries,
  kept: selection.entries,
  protectedEntries: 0,
  nonFinite: 0,
  path: 'full',
  candidates: entries,
  exactScores: entries,
  msScore: 12.5,
  msSelect: 0.25,
})

function contentsOf(selection: Selection, length: number, more: Partial<ReportContents> = {}): ReportContents {
  const entries = selection.layers * selection.sequences * selection.kvHeads * length
  return { title: 'A report', policy: policies.laprox({ keep: 0.05 }), selection, report: reportOf(selection, entries), lengths: length, ...more }
}

/** What the page of a report is given. */
async function read(file: string): Promise<Packed> {
  const html = await readFile(file, 'utf8')
  const [, data] = html.match(/<script type="application\/octet-stream" id="data">([^<]*)<\/script>/)!
  return unpack(new Uint8Array(gunzipSync(Buffer.from(data!, 'base64'))).buffer)
}

async function rejection(promise: Promise<unknown>): Promise<LaproxError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(LaproxError)
  return error as LaproxError
}

const small = { layers: 2, kvHeads: 2 }
/** Of 2 ** 29 tokens. */
const enormous = Selection.from({ layers: 1, kvHeads: 1, counts: [4], tokens: Int32Array.of(0, 1, 2 ** 28, 2 ** 29 - 1) })
const four = Selection.from({ ...small, counts: [2, 1, 0, 1], tokens: Int32Array.of(0, 9, 3, 39) })

describe('what is kept', () => {
  it('is marked at its position in every segment', async () => {
    const selection = clustered({ layers: 3, kvHeads: 2, tokens: 500, keep: 0.1 })
    await writeReport(target(), contentsOf(selection, 500))
    const packed = await read(target())
    const kept = new Kept(packed)
    for (let row = 0; row < 6; row++) {
      const marked = Array.from({ length: 500 }, (_, p) => p).filter((p) => kept.kept(0, row, p, p + 1) === 1)
      expect(marked).toEqual([...selection.kept(Math.floor(row / 2), 0, row % 2)])
    }
    expect(packed.payload.counts).toEqual([...selection.counts])
  })

  it('is marked at its original position where the cache had been evicted before', async () => {
    const positions = Int32Array.of(5, 90, 99, 0, 1, 40)
    const selection = Selection.from({ layers: 1, kvHeads: 2, counts: [1, 2], tokens: Int32Array.of(1, 0, 2) })
    await writeReport(target(), contentsOf(selection, 3, { positions, contextLengths: [100] }))
    const kept = new Kept(await read(target()))
    const all = (count: (position: number) => number) => Array.from({ length: 100 }, (_, p) => p).filter((p) => count(p) === 1)
    expect(all((p) => kept.kept(0, 0, p, p + 1))).toEqual([90])
    expect(all((p) => kept.kept(0, 1, p, p + 1))).toEqual([0, 40])
    expect(all((p) => kept.present(0, 0, p, p + 1))).toEqual([5, 90, 99])
    expect(all((p) => kept.present(0, 1, p, p + 1))).toEqual([0, 1, 40])
  })

  it('keeps sequences and segments of other lengths apart', async () => {
    const selection = Selection.from({ layers: 2, sequences: 2, kvHeads: 1, counts: [1, 1, 1, 1], tokens: Int32Array.of(4, 69, 2, 0) })
    const report = reportOf(selection, 110)
    await writeReport(target(), { ...contentsOf(selection, 0), report, lengths: [10, 70, 10, 20] })
    const { payload, ...arrays } = await read(target())
    expect(payload.contexts).toEqual([10, 70])
    const kept = new Kept({ payload, ...arrays })
    expect([kept.kept(0, 0, 4, 5), kept.kept(1, 0, 69, 70), kept.kept(0, 1, 2, 3), kept.kept(1, 1, 0, 1)]).toEqual([1, 1, 1, 1])
    expect([kept.present(1, 0, 0, 70), kept.present(1, 1, 0, 70), kept.present(1, 1, 20, 70)]).toEqual([70, 20, 0])
  })

  it('is counted between any two positions', () => {
    const random = new Random(7)
    const marked = Array.from({ length: 3 }, () => random.subset(300, 60))
    const words = new Uint32Array(3 * 10)
    for (const [row, positions] of marked.entries()) for (const p of positions) words[row * 10 + (p >>> 5)]! |= 1 << (p & 31)
    const marks = new Marks(words, 10, 1)
    for (let i = 0; i < 2000; i++) {
      const row = random.integer(0, 2)
      const begin = random.integer(0, 320)
      const end = random.integer(begin, 320)
      expect(marks.between(row, begin, end)).toBe(marked[row]!.filter((p) => p >= begin && p < end).length)
    }
  })

  it('is shared out to pixels, whatever the view', async () => {
    const selection = clustered({ layers: 4, kvHeads: 3, tokens: 400, keep: 0.1 })
    await writeReport(target(), contentsOf(selection, 400))
    const kept = new Kept(await read(target()))
    const all = Array.from({ length: 12 }, (_, row) => new Set(selection.kept(Math.floor(row / 3), 0, row % 3)))
    const views = [
      { view: { from: 0, to: 400, top: 0, bottom: 12 }, columns: 37, lines: 500 },
      { view: { from: 3.7, to: 21.2, top: 2.5, bottom: 4.5 }, columns: 100, lines: 500 },
      { view: { from: 0, to: 400, top: 0, bottom: 12 }, columns: 10, lines: 5 },
    ]
    for (const { view, columns, lines } of views) {
      const cells = kept.cells(0, view, columns, lines)
      expect(cells.begin[0]).toBe(Math.floor(view.from))
      expect(cells.end[columns - 1]).toBe(Math.max(Math.floor(view.to), cells.begin[columns - 1]! + 1))
      for (let line = 0; line < cells.lines; line++) {
        for (let column = 0; column < columns; column++) {
          let [count, of] = [0, 0]
          const first = cells.firstRow + line * cells.rowsPerLine
          for (let row = first; row < Math.min(first + cells.rowsPerLine, Math.ceil(view.bottom)); row++) {
            for (let p = cells.begin[column]!; p < cells.end[column]!; p++, of++) if (all[row]!.has(p)) count++
          }
          expect(cells.shares[line * columns + column]).toBe(Math.fround(count / of))
        }
      }
    }
    expect(kept.cells(0, { from: 0, to: 400, top: 0, bottom: 12 }, 1, 1).profile[0]).toBe(Math.fround(selection.entries / 4800))
  })
})

describe('the distribution of scores', () => {
  let device: Device
  beforeAll(async () => {
    device = await Device.open('cpu')
  })
  afterAll(() => device.dispose())

  const shape = { layers: 3, sequences: 2, kvHeads: 2 }
  const lengths = [40, 90, 200, 64, 120, 80, 33, 70, 100, 100, 128, 90].map((length) => length + 20)

  function scoresOf(value: (random: Random, segment: number) => number, seed = 3): Scores {
    const random = new Random(seed)
    const data = lengths.flatMap((length, x) => Array.from({ length }, () => value(random, x)))
    return Scores.from({ ...shape, lengths, data: Float32Array.from(data) })
  }

  /** What the oracle ranked: every entry's pooled score, its part, whether it was kept and why. */
  function ranked(scores: Scores, kept: readonly (readonly number[])[], rule: Policy) {
    return lengths.flatMap((length, x) => {
      const own = scores.data.subarray(scores.offsets[x], scores.offsets[x + 1])
      const pooled = oracle.pool(own, rule.pooling)
      const sequence = Math.floor(x / shape.kvHeads) % shape.sequences
      const part = rule.scope === 'model' ? sequence : rule.scope === 'layer' ? Math.floor(x / shape.kvHeads) : x
      return Array.from({ length }, (_, token) => ({
        score: pooled[token]!,
        part,
        kept: kept[x]!.includes(token),
        isProtected: token < rule.sinks || token >= length - rule.recent || rule.pinned.some(([begin, end]) => token >= begin && token < end),
        hasNumber: Number.isFinite(own[token]),
      }))
    })
  }

  function check(found: Distribution, entries: ReturnType<typeof ranked>): void {
    const competing = entries.filter(({ isProtected, hasNumber }) => !isProtected && hasNumber)
    const count = (from: number, to: number, kept: boolean) =>
      competing.filter((entry) => entry.kept === kept && entry.score >= from && entry.score < to).length
    const { edges } = found
    for (let i = 0; i + 1 < edges.length; i++) {
      expect(found.kept[i], `kept in bin ${i}`).toBe(count(edges[i]!, edges[i + 1]!, true))
      expect(found.dropped[i], `dropped in bin ${i}`).toBe(count(edges[i]!, edges[i + 1]!, false))
    }
    const all = [...found.kept, ...found.dropped, ...found.zero, ...found.below].reduce((sum, number) => sum + number, 0)
    expect(all).toBe(competing.length)
    expect(found.protected).toBe(entries.filter(({ isProtected }) => isProtected).length)
    expect(found.nonFinite).toBe(entries.filter(({ isProtected, hasNumber }) => !isProtected && !hasNumber).length)

    const thresholds: number[] = []
    let under = 0
    for (const part of new Set(competing.map((entry) => entry.part))) {
      const own = competing.filter((entry) => entry.part === part)
      const dropped = own.filter((entry) => !entry.kept).map(({ score }) => score)
      if (dropped.length === 0) continue
      const largest = Math.max(...dropped)
      const above = own.filter((entry) => entry.kept && entry.score >= largest).map(({ score }) => score)
      under += own.filter((entry) => entry.kept && entry.score < largest).length
      if (above.length > 0) thresholds.push(Math.min(...above))
    }
    expect([...found.thresholds].sort()).toEqual(thresholds.sort())
    expect(found.underThreshold).toBe(under)
  }

  const presets: [name: string, options: Omit<PolicyOptions, 'keep'>][] = [
    ['laprox', {}],
    ['laprox', { pooling: { kind: 'max', width: 1 }, pinned: [[20, 25]] }],
    ['laprox', { pooling: { kind: 'max', width: 255 }, floor: 0.4 }],
    ['snapkv', {}],
    ['adakv', {}],
    ['vatp', { scope: 'layer', nonFinite: 'keep' }],
  ]
  it.each(presets)('is that of plain arithmetic: %s %o', async (name, options) => {
    const rule = policy(name, { keep: 0.4, window: 16, ...options })
    // Heads differ in size, so that floors have something to do.
    const scores = scoresOf((random, x) =>
      options.nonFinite && random.chance(0.01) ? Number.NaN : random.chance(0.02) ? 0 : Math.exp(random.normal() - 4 + 3 * (x % 2)),
    )
    const selection = await select(scores, rule, { device })
    const kept = lengths.map((_, x) => [...selection.kept(Math.floor(x / 4), Math.floor(x / 2) % 2, x % 2)])
    const found = await distributionOf(new Entries(selection, { scores }), scores, selection, rule)
    check(found, ranked(scores, kept, rule))
    expect(found.scale).toBe('log')
    if (rule.floor === 0) expect(found.underThreshold).toBe(0)
    else expect(found.underThreshold).toBeGreaterThan(0)
    expect(found.thresholds.length).toBeGreaterThan(0)
  })

  it.each<[string, (random: Random) => number]>([
    ['negative scores, on a linear axis', (random) => -10 - random.next()],
    ['scores on both sides of zero', (random) => random.normal()],
    ['equal scores', () => 0.25],
    ['scores of zero', () => 0],
    ['scores that are all but equal', (random) => 1 + 1e-6 * random.next()],
    ['scores of very different size', (random) => 10 ** random.integer(-44, 30)],
  ])('is that of plain arithmetic: %s', async (_, value) => {
    const rule = policies.laprox({ keep: 0.4, window: 16, pooling: { kind: 'none' } })
    const scores = scoresOf(value)
    const selection = await select(scores, rule, { device })
    const kept = lengths.map((_, x) => [...selection.kept(Math.floor(x / 4), Math.floor(x / 2) % 2, x % 2)])
    const found = await distributionOf(new Entries(selection, { scores }), scores, selection, rule)
    check(found, ranked(scores, kept, rule))
    expect(found.edges.every(Number.isFinite)).toBe(true)
  })

  it('has a bin that ends at a threshold which is alone', async () => {
    const rule = policies.laprox({ keep: 0.4, window: 16 })
    const scores = Scores.from({
      layers: 1,
      kvHeads: 1,
      lengths: [5000],
      data: Float32Array.from({ length: 5000 }, (_, i) => Math.exp(Math.sin(i * i))),
    })
    const selection = await select(scores, rule, { device })
    const { edges, kept, dropped, thresholds } = await distributionOf(new Entries(selection, { scores }), scores, selection, rule)
    const at = edges.findIndex((edge) => Math.abs(edge / thresholds[0]! - 1) < 1e-3)
    expect(at).toBeGreaterThan(0)
    expect(kept.slice(0, at).every((count) => count === 0)).toBe(true)
    expect(dropped.slice(at + 1).every((count) => count === 0)).toBe(true)
  })

  it('leaves out what is protected by its original position', async () => {
    const rule = policies.laprox({ keep: 0.5, window: 8, pinned: [[40, 60]] })
    const random = new Random(9)
    const positions = Int32Array.from([random.subset(200, 50), random.subset(200, 80)].flat())
    const data = Float32Array.from({ length: 130 }, () => random.next())
    const scores = Scores.from({ layers: 1, kvHeads: 2, lengths: [50, 80], data, positions, contextLengths: [200] })
    const selection = await select(scores, rule, { device })
    const found = await distributionOf(new Entries(selection, { scores }), scores, selection, rule)
    const isProtected = (position: number) => position < 4 || position >= 192 || (position >= 40 && position < 60)
    expect(found.protected).toBe(positions.filter(isProtected).length)
    expect(found.protected).toBe(selection.report.protectedEntries)
    expect(found.underThreshold).toBe(0)
  })

  it('has no threshold where nothing is dropped', async () => {
    const rule = policies.laprox({ keep: 1, window: 16 })
    const scores = scoresOf((random) => random.next())
    const selection = await select(scores, rule, { device })
    expect((await distributionOf(new Entries(selection, { scores }), scores, selection, rule)).thresholds).toEqual([])
  })

  it('tells of kept entries that scores of another call do not explain', async () => {
    const rule = policies.laprox({ keep: 0.4, window: 16 })
    const selection = await select(
      scoresOf((random) => random.next()),
      rule,
      { device },
    )
    const others = scoresOf((random) => random.next(), 4)
    const found = await distributionOf(new Entries(selection, { scores: others }), others, selection, rule)
    expect(found.underThreshold).toBeGreaterThan(0)
    expect(found.floors).toBe(false)
  })

  it('pools in pieces as in one', () => {
    const random = new Random(5)
    const scores = Float32Array.from({ length: 400 }, () => (random.chance(0.05) ? Number.POSITIVE_INFINITY : random.normal()))
    for (const kind of ['max', 'mean'] as const) {
      for (const width of [1, 3, 5, 7, 9, 63, 255]) {
        const whole = oracle.pool(scores, { kind, width })
        for (const [begin, end] of [
          [0, 400],
          [0, 13],
          [13, 140],
          [399, 400],
        ] as const) {
          expect([...pool(scores, begin, end, { kind, width })]).toEqual([...whole.subarray(begin, end)])
        }
      }
    }
  })

  it('lets the event loop turn', async () => {
    const [many, length] = [16, 100_000]
    const data = new Float32Array(many * length).map((_, i) => i % 1013)
    const scores = Scores.from({ layers: 1, kvHeads: many, lengths: new Int32Array(many).fill(length), data })
    const selection = Selection.from({ layers: 1, kvHeads: many, counts: new Int32Array(many), tokens: new Int32Array(0) })
    let turns = 0
    const timer = setInterval(() => turns++, 0)
    await distributionOf(new Entries(selection, { scores }), scores, selection, policies.laprox({ keep: 0.05, pooling: { kind: 'mean', width: 15 } }))
    clearInterval(timer)
    expect(turns).toBeGreaterThan(2)
  })
})

describe('numbers', () => {
  it('are short', () => {
    expect([0, 1, 0.00123456, 0.000123456, -12.3456, 99_999, 123_456, 1e10].map(short)).toEqual([
      '0',
      '1',
      '0.00123',
      '1.23e-4',
      '-12.3',
      '100000',
      '1.23e5',
      '1e10',
    ])
    expect([0, -3, 12].map(powerOfTen)).toEqual(['10⁰', '10⁻³', '10¹²'])
    expect([0, 999, 1000, 1_234_567].map(grouped)).toEqual(['0', '999', '1,000', '1,234,567'])
    expect([positions(5, 6), positions(1000, 2000)]).toEqual(['position 5', 'positions 1,000 to 1,999'])
    expect([relative(0.0512), relative(null), relative(Number.POSITIVE_INFINITY)]).toEqual(['5.12\u00a0%', 'infinite', 'infinite'])
  })
})

describe('what is too large', () => {
  it('is binned, and told of', async () => {
    const { thinned } = await writeReport(target(), contentsOf(enormous, 2 ** 29))
    expect(thinned).toEqual([expect.stringContaining('1 heads of 536,870,912 positions are too many for a browser one by one')])
    const packed = await read(target())
    expect(packed.payload.thinned).toEqual(thinned)
    const { bin } = packed.payload
    expect(bin).toBe(128)
    const kept = new Kept(packed)
    expect([0, bin, 2 ** 28, 2 ** 29 - bin].map((begin) => kept.kept(0, 0, begin, begin + bin))).toEqual([2, 0, 1, 1])
    expect(kept.kept(0, 0, 0, 2 ** 29)).toBe(4)
    expect(kept.shareOfRows(0, 1)).toBe(2 / bin)
  })

  it.each([
    ['tokens', 300_000, 'a', 262_144],
    ['characters', 1000, 'x'.repeat(2 ** 14), 256],
  ])('loses its last texts: too many %s', async (_, count, text, shown) => {
    const selection = Selection.from({ layers: 1, kvHeads: 1, counts: [1], tokens: Int32Array.of(0) })
    const { thinned } = await writeReport(target(), contentsOf(selection, count, { tokens: new Array(count).fill(text) }))
    expect(thinned).toEqual([expect.stringMatching(/^The text of [\d,]+ tokens is too long for a browser: it ends after the first [\d,]+\.$/)])
    expect((await read(target())).payload.tokens).toHaveLength(shown)
  })
})

describe('the file', () => {
  it('holds what it was given, and its licences', async () => {
    const fidelity = { window: 0.1, layers: [{ window: 0.1 }, { window: 0.2, later: 0.3 }] }
    const facts = { Model: 'small' }
    const { bytes, thinned } = await writeReport(target(), contentsOf(four, 40, { fidelity, facts, tokens: new Array(40).fill('word') }))
    expect(thinned).toEqual([])
    expect((await stat(target())).size).toBe(bytes)
    const { payload } = await read(target())
    expect(payload.fidelity).toEqual(fidelity)
    expect(payload.figures.map(({ name, value }) => [name, value.replace('\u00a0', ' ')])).toEqual([
      ['Kept', '2.5 %'],
      ['Output error', '10 %'],
      ['Time', '12.8 ms'],
    ])
    expect(payload.tables.map(({ name }) => name)).toEqual(['Policy', 'Run', 'Facts'])
    expect(payload.tables[2]!.rows).toEqual([['Model', 'small']])
    const html = await readFile(target(), 'utf8')
    for (const licence of ['Apache License', 'BSD 3-Clause License', 'Mike Bostock', 'Microsoft Corporation']) expect(html).toContain(licence)
    expect(html).not.toContain('{{')
  })

  it.each<[Policy, string[]]>([
    [
      policies.laprox({ keep: 0.05, window: 1 }),
      [
        'Score: joint',
        'Pooling: max of 7 neighbours',
        'Budget: 5 % of the entries',
        'Ranked together: all layers and heads',
        'Window: the last query',
      ],
    ],
    [
      policies.criticalAdakv({ keep: { entries: 1_000_000 }, pinned: [[10, 2000]], nonFinite: 'keep' }),
      [
        'Score: mean attention × ‖vW‖₁, mean over the group',
        'Budget: 1,000,000 entries',
        'Ranked together: the heads of a layer',
        'Protected: positions 0 to 3, positions 10 to 1,999, the last 32 positions',
        'Floor: 20 % of an even share for each head',
        'Non-finite scores: kept',
      ],
    ],
    [policies.pyramidkv({ keep: { bytes: 2 ** 20 } }), ['Budget: 1.05 MB', 'Ranked together: each head by itself', 'Pyramid: beta 20']],
    [
      policies.tova({ keep: 0.1, sinks: 0, recent: 0 }),
      ['Score: attention of the last query, mean over the heads of the layer', 'Pooling: none', 'Protected: nothing'],
    ],
    [policies.random({ keep: 0.1, seed: 7, layerWeights: [1, 0.5] }), ['Score: random, seed 7', 'Layer weights: 1, 0.5']],
  ])('describes the policy: $name', async (rule, expected) => {
    await writeReport(target(), contentsOf(four, 40, { policy: rule }))
    const { payload } = await read(target())
    const rows = payload.tables[0]!.rows.map(([title, value]) => `${title}: ${value.replaceAll('\u00a0', ' ')}`)
    expect(rows).toEqual(expect.arrayContaining([`Policy: ${rule.name}`, ...expected]))
  })

  it('describes an eviction', async () => {
    const report = {
      ...reportOf(four, 160),
      path: 'pruned' as const,
      candidates: 20,
      exactScores: 10,
      fallback: 'large keep',
      nonFinite: 3,
      bytesBefore: 2_000_000,
      bytesAfter: 50_000,
      msCompact: 1,
    }
    await writeReport(target(), contentsOf(four, 40, { report }))
    const { payload } = await read(target())
    expect(payload.figures[1]).toEqual({ name: 'Cache', value: '50.0 kB', note: 'of 2.00 MB' })
    expect(payload.tables[1]!.rows.map(([title]) => title)).toEqual([
      'Entries',
      'Kept',
      'Exact scores',
      'Not pruned',
      'Non-finite scores',
      'Keys and values',
      'Time of scoring',
      'Time of ranking',
      'Time of moving rows',
    ])
    await writeReport(target(), contentsOf(four, 40, { report: { ...report, msScore: 0, msSelect: 0, msCompact: 0 } }))
    expect((await read(target())).payload.figures.map(({ name }) => name)).toEqual(['Kept', 'Cache'])
  })

  it('takes scores of a call, and their lengths with them', async () => {
    const data = Float32Array.from({ length: 160 }, (_, i) => 1 + (i % 7))
    const scores = Scores.from({ ...small, lengths: [40, 40, 40, 40], data })
    const { lengths: _, ...contents } = contentsOf(four, 40, { scores })
    await writeReport(target(), contents)
    const { payload } = await read(target())
    expect(payload.lengths).toEqual([40, 40, 40, 40])
    expect(payload.distribution?.edges[0]).toBe(7) // the pooling has all maxima
  })

  it('survives the packing of any text', () => {
    const { payload } = { payload: { title: '\ud800 </script> \u2028 😀' } } as unknown as Packed
    const packed = { payload, kept: Uint32Array.of(1, 2 ** 32 - 1), present: Uint32Array.of(5) }
    expect(unpack(pack(packed).buffer as ArrayBuffer)).toEqual(packed)
  })

  it('is replaced as a whole or not at all', async () => {
    const there = target('there.html')
    await writeFile(there, 'before')
    const bad = Selection.from({ ...small, counts: [2, 0, 0, 0], tokens: Int32Array.of(1, 40) })
    expect((await rejection(writeReport(there, contentsOf(bad, 40)))).code).toBe('OUT_OF_BOUNDS')
    expect(await readFile(there, 'utf8')).toBe('before')
    await writeReport(there, contentsOf(four, 40))
    expect(await readFile(there, 'utf8')).toContain('<!doctype html>')
    expect((await readdir(folder)).filter((name) => name.endsWith('.tmp'))).toEqual([])
  })

  it('cannot be written where there is no folder', async () => {
    const error = await rejection(writeReport(join(folder, 'nowhere', 'report.html'), contentsOf(four, 40)))
    expect(error.code).toBe('IO')
    expect(error.message).toContain('nowhere')
  })
})

describe('wrong contents', () => {
  const scores = Scores.from({ ...small, lengths: [40, 40, 40, 40], data: new Float32Array(160) })
  const batch = Selection.from({ layers: 1, sequences: 2, kvHeads: 1, counts: [1, 1], tokens: Int32Array.of(0, 0) })
  const cases: [what: string, contents: unknown, code: string, message: RegExp][] = [
    ['nothing', undefined, 'INVALID_ARGUMENT', /^contents is missing; expected an object with title/],
    ['a misspelt field', contentsOf(four, 40, { token: [] } as never), 'INVALID_ARGUMENT', /unknown field 'token'; did you mean 'tokens'/],
    ['no title', contentsOf(four, 40, { title: 7 as never }), 'INVALID_ARGUMENT', /^title is 7; expected a string/],
    ['no selection', contentsOf(four, 40, { selection: [] as never }), 'INVALID_ARGUMENT', /^selection is \[\]; expected a Selection/],
    ['a policy by name', contentsOf(four, 40, { policy: 'laprox' as never }), 'INVALID_ARGUMENT', /^policy is 'laprox'/],
    ['no report', contentsOf(four, 40, { report: undefined as never }), 'INVALID_ARGUMENT', /^report is missing/],
    [
      'another report',
      contentsOf(four, 40, { report: reportOf(batch, 2) }),
      'INVALID_ARGUMENT',
      /^report tells of 2 kept entries; expected those of the selection, 4/,
    ],
    ['no lengths', contentsOf(four, 40, { lengths: undefined }), 'INVALID_ARGUMENT', /^lengths is missing/],
    ['too few lengths', contentsOf(four, 40, { lengths: [40] }), 'INVALID_ARGUMENT', /^lengths has 1 numbers; expected one per segment, 4/],
    [
      'other lengths than scores',
      contentsOf(four, 41, { scores }),
      'INVALID_ARGUMENT',
      /^lengths\[0\] is 41; expected as many as there are scores, 40/,
    ],
    [
      'scores as an array',
      contentsOf(four, 40, { scores: new Float32Array(160) as never }),
      'INVALID_ARGUMENT',
      /^scores is Float32Array\(160\); expected Scores/,
    ],
    [
      'scores of another shape',
      { ...contentsOf(Selection.from({ layers: 4, kvHeads: 1, counts: [1, 1, 1, 1], tokens: new Int32Array(4) }), 40), scores },
      'INVALID_ARGUMENT',
      /^scores: layers is 2; expected that of the selection, 4/,
    ],
    [
      'a token that is not there',
      contentsOf(four, 39),
      'OUT_OF_BOUNDS',
      /^selection keeps token 39 of \(layer 1, sequence 0, head 1\); expected ascending tokens below 39/,
    ],
    ['positions alone', contentsOf(four, 40, { positions: new Int32Array(160) }), 'INVALID_ARGUMENT', /^contextLengths is missing/],
    [
      'too few positions',
      contentsOf(four, 40, { positions: new Int32Array(4), contextLengths: [99] }),
      'INVALID_ARGUMENT',
      /^positions has 4 numbers; expected one per entry, 160/,
    ],
    [
      'positions that do not ascend',
      contentsOf(four, 40, { positions: new Int32Array(160), contextLengths: [99] }),
      'OUT_OF_BOUNDS',
      /^positions\[1\] of \(layer 0, sequence 0, head 0\) is 0; expected ascending positions below 99/,
    ],
    [
      'errors of another model',
      contentsOf(four, 40, { fidelity: { window: 0, layers: [] } }),
      'INVALID_ARGUMENT',
      /^fidelity tells of 0 layers; expected those of the selection, 2/,
    ],
    ['too few texts', contentsOf(four, 40, { tokens: ['a'] }), 'INVALID_ARGUMENT', /^tokens has 1 texts; expected one per position, 40/],
    ['texts that are numbers', contentsOf(four, 40, { tokens: new Array(40).fill(1) }), 'INVALID_ARGUMENT', /^tokens\[0\] is 1; expected a string/],
    [
      'texts of several sequences',
      contentsOf(batch, 2, { tokens: ['a', 'b'] }),
      'INVALID_ARGUMENT',
      /^tokens are those of one sequence; the selection has 2/,
    ],
    [
      'facts that are numbers',
      contentsOf(four, 40, { facts: { threads: 2 as never } }),
      'INVALID_ARGUMENT',
      /^facts\['threads'\] is 2; expected a string/,
    ],
  ]
  it.each(cases)('%s', async (_, contents, code, message) => {
    const error = await rejection(writeReport(target('wrong.html'), contents as ReportContents))
    expect(error.message).toMatch(message)
    expect(error.code).toBe(code)
    await expect(stat(target('wrong.html'))).rejects.toThrow('ENOENT')
  })
})

const why = chromium === undefined ? ' (skipped: no chromium on PATH, and $CHROMIUM names none)' : ''
describe.skipIf(chromium === undefined)(`in Chromium${why}`, () => {
  let browser: Browser
  /** 1,024 tokens; 8 tokens, the first of which the first head keeps. */
  let usual: string
  let tiny: string
  beforeAll(async () => {
    browser = await launchChromium()
    usual = target('usual.html')
    tiny = target('tiny.html')
    await writeReport(usual, contentsOf(clustered({ ...shape, tokens: 1024 }), 1024, { tokens: words(1024) }))
    const first = Selection.from({ ...small, counts: [1, 0, 0, 0], tokens: Int32Array.of(0) })
    await writeReport(tiny, contentsOf(first, 8, { tokens: [...'abcdefgh'] }))
  })
  afterAll(() => browser?.close())

  const shape = { layers: 32, kvHeads: 8, keep: 0.05 }
  const words = (count: number) => Array.from({ length: count }, (_, i) => (i % 12 === 11 ? '\n' : ` word${i}`))

  /** Opens a report; `complaints` are what the console says and what the page asks the network for. */
  async function open(file: string, { width = 1200, dark = false } = {}): Promise<{ page: Page; complaints: string[] }> {
    const page = await browser.newPage()
    const complaints: string[] = []
    page.on('console', (message) => complaints.push(`${message.type()}: ${message.text()}`))
    page.on('pageerror', (error) => complaints.push(String(error)))
    page.on('request', (request) => {
      if (!/^(file|data):/.test(request.url())) complaints.push(`request: ${request.url()}`)
    })
    await page.setViewport({ width, height: 900 })
    await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: dark ? 'dark' : 'light' }])
    await page.goto(pathToFileURL(file).href)
    await page.waitForFunction('document.querySelector("#range").textContent !== "" || !document.querySelector("#failure").hidden')
    return { page, complaints }
  }

  const text = (page: Page, selector: string): Promise<string> =>
    page.evaluate(`document.querySelector(${JSON.stringify(selector)}).textContent.replaceAll("\\u00a0", " ")`) as Promise<string>

  /** The visible range, once it has come to rest on what is expected. */
  async function expectRange(page: Page, range: string): Promise<void> {
    await expect.poll(() => text(page, '#range'), { timeout: 5000 }).toContain(range)
  }

  /** From an event of the heat map until its frame is there, in milliseconds. */
  async function timed(page: Page, event: string, act: () => Promise<unknown>): Promise<number> {
    await page.evaluate(`void (window.frame = new Promise((resolve) => document.querySelector('#heat-map').addEventListener('${event}', () => {
      const begun = performance.now()
      requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now() - begun)))
    }, { capture: true, once: true })))`)
    await act()
    return (await page.evaluate('window.frame')) as number
  }

  /** The colour [r, g, b] of the heat map's canvas, at shares of its picture's width and height. */
  const colour = (page: Page, x: number, y: number): Promise<number[]> =>
    page.evaluate(`(() => {
      const canvas = document.querySelector('#heat-map canvas')
      const [width, height] = [canvas.clientWidth - 92, canvas.clientHeight - 116]
      const scale = canvas.width / canvas.clientWidth
      const at = [52 + ${x} * width, 54 + ${y} * height].map((pixel) => Math.round(pixel * scale))
      return [...canvas.getContext('2d').getImageData(...at, 1, 1).data.slice(0, 3)]
    })()`) as Promise<number[]>

  describe.each([
    { tokens: 4096, most: 1e6 },
    { tokens: 131_072, most: 4e6 },
  ])('a report of $tokens tokens', ({ tokens, most }) => {
    let page: Page
    let complaints: string[]
    beforeAll(async () => {
      const file = target(`${tokens}.html`)
      const { bytes, thinned } = await writeReport(file, contentsOf(clustered({ ...shape, tokens }), tokens, { tokens: words(tokens) }))
      expect(bytes).toBeLessThan(most)
      expect(thinned).toEqual([])
      ;({ page, complaints } = await open(file))
    })
    afterAll(() => page?.close())

    it('opens without a word on the console or to the network', async () => {
      await expectRange(page, `positions 0 to ${(tokens - 1).toLocaleString('en-US')}, all 32 layers`)
      expect(complaints).toEqual([])
    })

    it('zooms within 100 ms, by keys and by the wheel', async () => {
      await page.focus('#heat-map')
      const times: number[] = []
      for (const key of ['+', '+', '+', '-', 'ArrowRight', '+', '+']) times.push(await timed(page, 'keydown', () => page.keyboard.press(key as '+')))
      const box = (await (await page.$('#heat-map'))!.boundingBox())!
      await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2)
      for (const deltaY of [120, 120, 120, -120, -120]) times.push(await timed(page, 'wheel', () => page.mouse.wheel({ deltaY })))
      const median = times.sort((a, b) => a - b)[Math.floor(times.length / 2)]!
      expect(median, `median of ${times.map((ms) => ms.toFixed(0)).join(', ')} ms`).toBeLessThan(100)
      await page.keyboard.press('0')
      await expectRange(page, `positions 0 to ${(tokens - 1).toLocaleString('en-US')}, all 32 layers`)
      expect(complaints).toEqual([])
    })
  })

  describe('by keyboard', () => {
    let page: Page
    beforeAll(async () => {
      ;({ page } = await open(usual))
    })
    afterAll(() => page?.close())

    it('the heat map is reached, seen to be in focus, and named', async () => {
      await page.focus('[data-move="all"]')
      await page.keyboard.press('Tab')
      expect(await page.evaluate('document.activeElement.id')).toBe('heat-map')
      expect(await page.evaluate('getComputedStyle(document.activeElement).outlineStyle')).toBe('solid')
      const heatMap = (await page.$('#heat-map'))!
      const accessible = (await page.accessibility.snapshot({ root: heatMap, interestingOnly: false }))!
      expect(accessible).toMatchObject({ role: 'application', name: 'What was kept, and where', roledescription: 'heat map' })
    })

    it.each([
      [['+'], 'positions 256 to 767, all 32 layers'],
      [['ArrowRight'], 'positions 384 to 895,'],
      [['ArrowLeft', 'ArrowLeft'], 'positions 128 to 639,'],
      [['End'], 'positions 512 to 1,023,'],
      [['Home'], 'positions 0 to 511,'],
      [['-'], 'positions 0 to 1,023,'],
      [['Shift+ArrowUp', 'Shift+ArrowUp'], 'layers 12 to 19;'],
      [['ArrowDown'], 'layers 14 to 21;'],
      [['ArrowUp'], 'layers 12 to 19;'],
      [['Shift+ArrowDown'], 'layers 8 to 23;'],
      [['0'], 'positions 0 to 1,023, all 32 layers'],
    ])('%s shows %s', async (keys, range) => {
      await page.focus('#heat-map')
      for (const key of keys) {
        const [name, modifier] = key
          .split('+')
          .filter((part) => part !== '')
          .reverse() as ['ArrowUp', 'Shift'?]
        if (modifier !== undefined) await page.keyboard.down(modifier)
        await page.keyboard.press(name ?? '+')
        if (modifier !== undefined) await page.keyboard.up(modifier)
      }
      await expectRange(page, range)
    })

    it('Enter goes to the middle of the view in the text', async () => {
      await page.focus('#heat-map')
      await page.keyboard.press('Enter')
      expect(await page.evaluate('document.activeElement.id')).toBe('text')
      expect(await text(page, '#text .found')).toBe(' word512')
      expect(await text(page, '#token')).toMatch(/^Position 512, “ word512”: kept by \d+ of 256 heads/)
    })
  })

  it('leaves the wheel to the page until the heat map is in use', async () => {
    const { page } = await open(usual)
    const box = (await (await page.$('#heat-map'))!.boundingBox())!
    await page.mouse.move(box.x + box.width / 2, box.y + 100)
    await page.mouse.wheel({ deltaY: 120 })
    await expect.poll(() => page.evaluate('scrollY')).toBeGreaterThan(0)
    await expectRange(page, 'positions 0 to 1,023,')
    await page.close()
  })

  it('tells of the cell under the pointer', async () => {
    const { page, complaints } = await open(tiny)
    const box = (await (await page.$('#heat-map'))!.boundingBox())!
    await page.mouse.move(box.x + 60, box.y + 60)
    expect(await text(page, '#heat-map .tip')).toBe('Layer 0, head 0position 0kepta')
    await page.mouse.move(box.x + 60, box.y + 54 + 3.5 * 22)
    expect(await text(page, '#heat-map .tip')).toBe('Layer 1, head 1position 0droppeda')
    expect(complaints).toEqual([])
    await page.close()
  })

  it('is light or dark as the system, or as the button says', async () => {
    const looks = async (page: Page) => ({
      paper: await page.evaluate('getComputedStyle(document.body).backgroundColor'),
      kept: await colour(page, 0.05, 0.1),
      dropped: await colour(page, 0.5, 0.1),
    })
    const light = { paper: 'rgb(255, 255, 255)', kept: [0x12, 0x27, 0x5a], dropped: [0xf1, 0xf4, 0xf6] }
    const dark = { paper: 'rgb(18, 22, 27)', kept: [0xfb, 0xf3, 0xb0], dropped: [0x1a, 0x21, 0x29] }
    for (const [system, first, second] of [
      ['light', light, dark],
      ['dark', dark, light],
    ] as const) {
      const { page } = await open(tiny, { dark: system === 'dark' })
      expect(await looks(page)).toEqual(first)
      await page.click('#theme')
      await expect.poll(() => looks(page)).toEqual(second)
      await page.close()
    }
  })

  it('fits on a narrow screen', async () => {
    const { page } = await open(usual, { width: 400 })
    expect(await page.evaluate('document.documentElement.scrollWidth')).toBe(400)
    await page.close()
  })

  it('shows every text as it is', async () => {
    const evil = '</script><img src=x onerror="window.hit = 1">&amp;{{data}}$&'
    const tokens = new Array(40).fill(evil)
    await writeReport(target('evil.html'), contentsOf(four, 40, { title: evil, tokens, facts: { [evil]: evil } }))
    const { page, complaints } = await open(target('evil.html'))
    expect(await text(page, 'h1')).toBe(evil)
    expect(await page.title()).toBe(evil)
    expect(await text(page, '#text span')).toBe(evil)
    expect(await text(page, '#tables > div:last-child td')).toBe(evil)
    await page.hover('#text span')
    await page.mouse.move(300, 500)
    expect(await page.evaluate('[document.images.length, window.hit]')).toEqual([0, null])
    expect(complaints).toEqual([])
    await page.close()
  })

  it('shows scores, errors and tables', async () => {
    const device = await Device.open('cpu')
    const random = new Random(2)
    // Floors have something to do in the first sequence, whose heads differ.
    const sizes = [0, 3, 0, 0.5]
    const data = Float32Array.from({ length: 12 * 300 }, (_, i) => Math.exp(random.normal() + sizes[Math.floor(i / 300) % 4]!))
    const scores = Scores.from({ layers: 3, sequences: 2, kvHeads: 2, lengths: new Int32Array(12).fill(300), data })
    const rule = policies.adakv({ keep: 0.3, window: 16, pooling: { kind: 'none' } })
    const selection = await select(scores, rule, { device })
    device.dispose()
    const layers = [0.1, Number.POSITIVE_INFINITY, 0.1].map((later) => ({ window: 0.1, later }))
    const fidelity = { window: 0.1, later: Number.POSITIVE_INFINITY, layers }
    await writeReport(target('all.html'), { title: 'All of it', policy: rule, selection, report: selection.report, scores, fidelity })
    const { page, complaints } = await open(target('all.html'))
    expect(await text(page, '#scores-caption')).toMatch(
      /^3,360 entries were ranked.* Each layer has its threshold.*: 6 from .* entries below it are kept because of the policy’s floor/,
    )
    expect(await text(page, '#fidelity-caption')).toContain('All layers together: 10 % over the window’s queries, infinite over later queries')
    await page.evaluate('document.querySelectorAll("details").forEach((details) => { details.open = true })')
    const rows = (id: string) => page.evaluate(`document.querySelectorAll('#${id} tbody tr').length`)
    await expect.poll(() => rows('shares-table')).toBe(3)
    await expect.poll(() => rows('fidelity-table')).toBe(3)
    await expect.poll(() => rows('scores-table')).toBeGreaterThan(30)
    const before = await text(page, '#shares-table')
    await page.select('#sequence', '1')
    expect(await text(page, '#shares-table')).not.toBe(before)
    const kept = selection.counts.reduce((sum, count, x) => (Math.floor(x / 2) % 2 === 1 ? sum + count : sum), 0)
    await expectRange(page, `positions 0 to 299, all 3 layers; ${Number(((100 * kept) / 1800).toPrecision(3))} % kept`)
    expect(complaints).toEqual([])
    await page.close()
  })

  it('opens what was thinned out, and says so', async () => {
    await writeReport(target('binned.html'), contentsOf(enormous, 2 ** 29))
    const { page, complaints } = await open(target('binned.html'))
    expect(await text(page, '#thinned')).toContain('what is kept was counted for every 128 positions together')
    await page.focus('#heat-map')
    for (let i = 0; i < 24; i++) await page.keyboard.press('+')
    await expectRange(page, 'positions 268,434,944 to 268,435,967')
    expect(complaints).toEqual([])
    await page.close()
  })

  it('says what is wrong where it cannot be shown', async () => {
    const html = await readFile(tiny, 'utf8')
    await writeFile(target('broken.html'), html.replace(/(id="data">)[^<]{20}/, '$1'))
    const { page } = await open(target('broken.html'))
    expect(await text(page, '#failure')).toContain('This report cannot be shown here')
    await page.close()
  })
})
