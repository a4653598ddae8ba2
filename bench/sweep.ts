import { lineChart } from './chart.js'
import type { Measurement } from './measurement.js'

/** What the stages take as one parameter grows. */
export interface Sweep {
  /** The parameter that grows. */
  readonly along: string
  /** What it counts. */
  readonly of: string
  /** Its values, ascending. */
  readonly values: readonly number[]
  readonly stages: readonly { readonly name: string; readonly ms: readonly number[] }[]
  /** The other parameters. */
  readonly fixed: Measurement['parameters']
}

const counted: Readonly<Record<string, string>> = {
  tokens: 'cached tokens',
  window: 'queries in the observation window',
  group: 'query heads a KV head',
  threads: 'threads',
}

/** The sweeps among measurements, in their order. */
export function sweeps(results: readonly Measurement[]): Sweep[] {
  const parameters = [...new Set(results.flatMap(({ along }) => along ?? []))]
  const all = parameters.map((along) => {
    const points = results.filter((result) => result.along === along)
    const names = [...new Set(points.map(({ name }) => name))]
    const { [along]: _, ...fixed } = points[0]!.parameters
    return {
      along,
      of: counted[along] ?? along,
      values: [...new Set(points.map((point) => point.parameters[along] as number))],
      stages: names.map((name) => ({ name, ms: points.filter((point) => point.name === name).map(({ msMedian }) => msMedian!) })),
      fixed,
    }
  })
  return all.filter(({ values }) => values.length > 1) // one thread is all that one core has
}

/** Milliseconds on logarithmic axes, as SVG. */
export function sweepChart({ of, values, stages, fixed }: Sweep): string {
  const format = (value: number) => (value >= 1024 && value % 1024 === 0 ? `${value / 1024}k` : String(value))
  const size = ['tokens', 'window', 'group', 'threads'].flatMap((name) => (name in fixed ? `${name} ${format(fixed[name] as number)}` : []))
  return lineChart({
    title: `One layer by ${of} (${size.join(', ')})`,
    x: { name: of, log: true, ticks: values, format },
    y: { name: 'milliseconds', log: true },
    lines: stages.map(({ name, ms }) => ({ name, points: ms.map((value, i) => [values[i]!, value]) })),
  })
}
