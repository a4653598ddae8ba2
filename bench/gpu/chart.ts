import { barChart } from '../chart.js'
import { roughly } from '../markdown.js'
import { find } from './goals.js'
import type { Peer, Result } from './results.js'

const model = 'Llama-3.1-8B'
const n = 131072

/** What is compared, and by which of the peers' variants. */
const comparisons: readonly { readonly title: string; readonly wanted: Partial<Result>; readonly variant?: string }[] = [
  { title: 'whole eviction, 5 % kept', wanted: { stage: 'evict-kept-norms', input: 'peaked' } },
  { title: 'every joint score', wanted: { stage: 'score-joint', input: 'peaked' }, variant: 'all pairs' },
  { title: 'every SnapKV score', wanted: { stage: 'score-snapkv', input: 'peaked' }, variant: '' },
  { title: 'selection of 5 %', wanted: { stage: 'select', input: 'peaked' }, variant: 'torch.topk, not pooled' },
  { title: 'moving the kept 5 %', wanted: { stage: 'compact', input: 'peaked', keep: 0.05 }, variant: 'gather, as many of each head' },
]

const series: readonly { readonly name: string; readonly peer: Peer | undefined }[] = [
  { name: 'laprox', peer: undefined },
  { name: 'PyTorch, compiled', peer: 'torch-compiled' },
  { name: 'PyTorch, eager', peer: 'torch-eager' },
]

/** Milliseconds of laprox and of PyTorch on a logarithmic axis, as SVG. */
export function chart(results: readonly Result[]): string {
  return barChart({
    title: 'Milliseconds of laprox and PyTorch, Llama-3.1-8B, 131,072 tokens',
    x: { name: 'logarithmic axis', log: true, format: (ms) => `${Number(roughly(ms))} ms` },
    series: series.map(({ name }) => name),
    groups: comparisons.map(({ title, wanted, variant }) => ({
      name: title,
      values: series.map(({ peer }) => {
        const { stage, keep } = wanted
        const of = peer === undefined ? wanted : variant === undefined ? { stage: '-' } : { stage, variant, ...(keep === undefined ? {} : { keep }) }
        const found = find(results, { model, n, peer, kernels: undefined, ...of })
        return found && found.medianUs / 1000
      }),
    })),
  })
}
