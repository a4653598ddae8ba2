import { find } from './goals.js'
import type { Peer, Result } from './results.js'

const model = 'Llama-3.1-8B'
const n = 131072

/** What is compared, and by which of the peers' variants. */
const comparisons: readonly { readonly title: string; readonly wanted: Partial<Result>; readonly variant?: string }[] = [
  { title: 'whole eviction, 5 % kept', wanted: { stage: 'evict-kept-norms', input: 'peaked' } },
  { title: 'every joint score', wanted: { stage: 'score-joint', input: 'peaked' }, variant: 'own pairs only' },
  { title: 'every SnapKV score', wanted: { stage: 'score-snapkv', input: 'peaked' }, variant: '' },
  { title: 'selection of 5 %', wanted: { stage: 'select', input: 'peaked' }, variant: 'torch.topk, not pooled' },
  { title: 'moving the kept 5 %', wanted: { stage: 'compact', input: 'peaked', keep: 0.05 }, variant: 'gather, as many of each head' },
]

const series: readonly { readonly name: string; readonly peer: Peer | undefined; readonly color: string }[] = [
  { name: 'laprox', peer: undefined, color: '#2f6fde' },
  { name: 'PyTorch, compiled', peer: 'torch-compiled', color: '#e08a1e' },
  { name: 'PyTorch, eager', peer: 'torch-eager', color: '#8a8f98' },
]

const width = 760
const left = 190
const right = 80
const bar = 16
const gap = 18

/** Milliseconds of laprox and of PyTorch on a logarithmic axis, as SVG. */
export function chart(results: readonly Result[]): string {
  const groups = comparisons.map(({ title, wanted, variant }) => ({
    title,
    bars: series.flatMap(({ peer, color }) => {
      const { stage, keep } = wanted
      const of = peer === undefined ? wanted : variant === undefined ? { stage: '-' } : { stage, variant, ...(keep === undefined ? {} : { keep }) }
      const found = find(results, { model, n, peer, kernels: undefined, ...of })
      return found === undefined ? [] : [{ ms: found.medianUs / 1000, color }]
    }),
  }))
  const all = groups.flatMap(({ bars }) => bars.map(({ ms }) => ms))
  const [low, high] = [10 ** Math.floor(Math.log10(Math.min(...all))), 10 ** Math.ceil(Math.log10(Math.max(...all)))]
  const x = (ms: number) => left + ((width - left - right) * Math.log10(ms / low)) / Math.log10(high / low)

  const parts: string[] = []
  let y = 56
  for (const { title, bars } of groups) {
    parts.push(text(left - 10, y + (bars.length * bar) / 2 + 4, title, 'end'))
    for (const { ms, color } of bars) {
      parts.push(`<rect x="${left}" y="${y}" width="${(x(ms) - left).toFixed(1)}" height="${bar - 3}" fill="${color}"/>`)
      parts.push(text(x(ms) + 6, y + bar - 6, `${Number(ms.toPrecision(2))} ms`, 'start'))
      y += bar
    }
    y += gap
  }
  const ticks = Array.from({ length: Math.round(Math.log10(high / low)) + 1 }, (_, i) => low * 10 ** i)
  const grid = ticks.map(
    (ms) => `<line x1="${x(ms)}" y1="48" x2="${x(ms)}" y2="${y}"/>${text(x(ms), y + 16, `${Number(ms.toPrecision(2))} ms`, 'middle')}`,
  )
  const legend = series.map(
    ({ name, color }, i) =>
      `<rect x="${left + i * 170}" y="18" width="12" height="12" fill="${color}"/>${text(left + 18 + i * 170, 28, name, 'start')}`,
  )
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${y + 28}" font-family="system-ui, sans-serif" font-size="13">
<title>Milliseconds of laprox and PyTorch, Llama-3.1-8B, 131,072 tokens</title>
<style>text { fill: #1f2328 } line { stroke: #8a8f98; stroke-opacity: 0.35 } @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }</style>
${[...legend, ...grid, ...parts].join('\n')}
</svg>
`
}

function text(x: number, y: number, of: string, anchor: string): string {
  return `<text x="${x.toFixed(1)}" y="${y}" text-anchor="${anchor}">${of}</text>`
}
