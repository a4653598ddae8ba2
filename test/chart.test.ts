import { describe, expect, it } from 'vitest'
import { barChart, lineChart } from '../bench/chart.js'

const lines = {
  title: 'Loss & kept share',
  x: { name: 'kept', log: true, ticks: [1.5, 5, 20], format: (share: number) => `${share} %` },
  y: { name: 'nats' },
  lines: Array.from({ length: 12 }, (_, i) => ({
    name: `policy ${i}`,
    points: [[1.5, 0.9 - i / 20] as const, [5, 0.3 - i / 50] as const, [20, 0.1] as const],
  })),
}
const bars = {
  title: 'Milliseconds',
  x: { name: 'logarithmic', log: true, format: (ms: number) => `${ms} ms` },
  series: ['laprox', 'peer'],
  groups: [
    { name: 'score', values: [20, 300] },
    { name: 'evict', values: [0.5, undefined] },
  ],
}

/** What a reader reads, in its order. */
function texts(svg: string): string[] {
  return [...svg.matchAll(/<text[^>]*>([^<]*)<\/text>/g)].map(([, text]) => text!)
}

describe.each([
  ['a line chart', () => lineChart(lines)],
  ['a bar chart', () => barChart(bars)],
])('%s', (_, draw) => {
  it('is the same text whatever was drawn before', () => {
    const first = draw()
    lineChart(lines)
    barChart(bars)
    expect(draw()).toBe(first)
  })

  it('has a title, no ground, and no colour without one for dark pages', () => {
    const svg = draw()
    expect(svg).toMatch(/<title>(Loss &amp; kept share|Milliseconds)<\/title>/)
    expect(svg).toMatch(/^<svg[^>]* viewBox="0 0 760 \d+"/)
    const [, style] = /<style>@media \(prefers-color-scheme:dark\)\{(.*)\}<\/style>/.exec(svg)!
    const drawn = svg
      .replace(/<defs[\s\S]*<\/defs>/, '')
      .matchAll(/(?:fill|stroke)="(#[0-9a-f]+|rgb[^"]*)"(?![^>]*(?:opacity="0"|stroke-width="0"))/g)
    const colors = new Set([...drawn].map(([, color]) => color!))
    colors.delete('#000') // of the inside of a dashed line in the legend, which has none
    expect(colors.size).toBeGreaterThan(3)
    for (const color of colors) expect(style).toContain(`[fill="${color}"]{fill:`)
  })
})

describe('a line chart', () => {
  it('names its lines from the one that ends highest down, its axes, and their ticks', () => {
    const ends = [3, 30, 10]
    const svg = lineChart({
      ...lines,
      y: { name: 'ms', log: true },
      lines: ends.map((end) => ({ name: `ends at ${end}`, points: [[1.5, 300] as const, [20, end] as const] })),
    })
    const read = texts(svg)
    expect(read.filter((text) => text.startsWith('ends'))).toEqual(['ends at 30', 'ends at 10', 'ends at 3'])
    for (const text of ['kept', 'ms', '1.5 %', '5 %', '20 %', '1', '10', '100', '1,000']) expect(read).toContain(text)
  })

  it.each([
    [0, 1],
    [-1, 1],
    [1, Number.NaN],
    [Number.POSITIVE_INFINITY, 1],
  ])('refuses a point (%d, %d) that its axes cannot show', (x, y) => {
    expect(() => lineChart({ ...lines, lines: [{ name: 'laprox', points: [[x, y]] }] })).toThrow(`Loss & kept share: laprox has a point (${x}, ${y})`)
  })
})

describe('a bar chart', () => {
  it('shows each value at its bar, and nothing where there is none', () => {
    expect(texts(barChart(bars)).filter((text) => / ms$/.test(text))).toEqual(expect.arrayContaining(['20 ms', '300 ms', '0.5 ms']))
    expect(barChart(bars)).not.toMatch(/NaN|undefined|- ms/)
  })

  it('refuses a bar that its axis cannot show', () => {
    expect(() => barChart({ ...bars, groups: [{ name: 'score', values: [0, 1] }] })).toThrow('Milliseconds: there is a bar of 0')
  })
})
