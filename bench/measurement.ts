import type { Timing } from '#lib/cli/timing'
import type { Machine } from './machine.js'

/** What a benchmark is to show. */
export interface Goal {
  readonly what: string
  readonly value: number
  readonly wanted: 'at least' | 'at most' | 'below'
  readonly limit: number
  readonly unit: Unit
  readonly met: boolean
}

export type Unit = '%' | 'times' | 'µs' | 'ms' | 'MiB'

/** What the machine can do at most, measured in the same run. */
export interface MachineRate {
  /** Operations or bytes a second. */
  readonly value: number
  readonly unit: 'operations' | 'bytes'
  /** What reached it. */
  readonly of: string
}

/** One thing that was measured, as it stands in the JSON. */
export interface Measurement extends Partial<Timing> {
  /** What `--only` calls the benchmark that it belongs to. */
  readonly benchmark: string
  readonly name: string
  readonly parameters: Readonly<Record<string, number | string>>
  /** The parameter that grows from one measurement of this name to the next. */
  readonly along?: string
  /** Of one run; a multiplication and an addition are two. */
  readonly operations?: number
  /** Moved in one run. */
  readonly bytes?: number
  /** Of the machine's rate, 0 to 1. */
  readonly share?: number
  readonly machineRate?: MachineRate
  /** What else was seen, by name. */
  readonly figures?: Readonly<Record<string, number>>
  readonly goals?: readonly Goal[]
  /** What a reader has to know. */
  readonly note?: string
}

/** A run of the benchmarks, as it stands in the JSON. */
export interface Results {
  readonly machine: Machine
  readonly commit: string
  /** ISO 8601. */
  readonly date: string
  /** Whether sizes were small, which makes the figures worthless. */
  readonly quick: boolean
  readonly results: readonly Measurement[]
}

/** What a benchmark is told. */
export interface Settings {
  /** Small sizes and few repeats: whether everything works, not how fast it is. */
  readonly quick: boolean
  readonly threads: number
}

/** A benchmark by the name that `--only` calls it: what it measures comes as it is there. */
export type Benchmark = (settings: Settings) => AsyncIterable<Measurement>

export function goal(what: string, value: number, wanted: Goal['wanted'], limit: number, unit: Unit): Goal {
  const met = wanted === 'at least' ? value >= limit : wanted === 'at most' ? value <= limit : value < limit
  return { what, value, wanted, limit, unit, met }
}

/** The share of the machine's rate that `amount` operations or bytes in one run reach; nothing where no rate could be measured. */
export function shareOf(machineRate: MachineRate | undefined, amount: number, { msMedian }: Timing): Reached {
  return machineRate === undefined ? {} : { machineRate, share: amount / (msMedian / 1000) / machineRate.value }
}

export type Reached = Pick<Measurement, 'machineRate' | 'share'>

/** Of the shares of several rates the largest: the rate that binds. */
export function binding(...reached: readonly Reached[]): Reached {
  return reached.reduce((largest, other) => ((other.share ?? 0) > (largest.share ?? 0) ? other : largest))
}
