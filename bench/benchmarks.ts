import type { Benchmark } from './measurement.js'

/** Benchmarks by the names that `--only` calls them, in the order of a whole run. One that is not measured is not loaded either. */
export const benchmarks: Readonly<Record<string, () => Promise<Benchmark>>> = {
  score: async () => (await import('./score.js')).score,
  evict: async () => (await import('./evict.js')).evict,
  select: async () => (await import('./select.js')).select,
  compact: async () => (await import('./compact.js')).compact,
  latency: async () => (await import('./latency.js')).latency,
  'event-loop': async () => (await import('./event-loop.js')).eventLoop,
  growth: async () => (await import('./growth.js')).growth,
}
