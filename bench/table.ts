import { table as columns } from '../lib/cli/table.js'
import { round } from './markdown.js'
import type { Goal, Measurement } from './measurement.js'
import { type Sweep, sweeps } from './sweep.js'

/** One measurement as lines for a terminal. */
export function lines(measurement: Measurement): string {
  const { benchmark, name, along, figures = {} } = measurement
  const speed = [time(measurement), rate(measurement)].filter((part) => part !== '').join(', ')
  if (along !== undefined) return `${benchmark}: ${name}, ${along} ${measurement.parameters[along]}: ${speed}`
  return [
    `${benchmark}: ${name}`,
    `  ${parameters(measurement.parameters)}`,
    `  ${speed}`,
    ...Object.entries(figures).map(([figure, value]) => `  ${figure} ${round(value)}`),
  ].join('\n')
}

/** What is asked of the measurements, and what grows with what, for a terminal. */
export function table(results: readonly Measurement[]): string {
  const goals = results.flatMap(({ name, goals = [] }) =>
    goals.map((goal) => [`${name}: ${goal.what}`, wanted(goal), measured(goal), goal.met ? 'met' : 'NOT MET']),
  )
  return [
    ...(goals.length > 0 ? [columns([['goal', 'wanted', 'measured', ''], ...goals])] : []),
    ...sweeps(results).map((sweep) => sweepTable(sweep)),
  ].join('\n\n')
}

function sweepTable({ along, values, stages, fixed }: Sweep): string {
  const head = [along, ...stages.map(({ name }) => `${name}, ms`)]
  const body = values.map((value, i) => [String(value), ...stages.map(({ ms }) => round(ms[i]!))])
  return `${columns([head, ...body], 0)}\n${parameters(fixed)}`
}

export function wanted({ wanted, limit, unit }: Goal): string {
  return `${wanted} ${round(limit)} ${unit}`
}

export function measured({ value, unit }: Goal): string {
  return `${round(value)} ${unit}`
}

export function parameters(of: Measurement['parameters']): string {
  return Object.entries(of)
    .map(([name, value]) => `${name} ${value}`)
    .join(', ')
}

export function time({ msMedian, msP10, msP90 }: Measurement): string {
  return msMedian === undefined ? '' : `${round(msMedian)} ms (${round(msP10!)} to ${round(msP90!)})`
}

/** `52.1 GFLOP/s, 61.3 % of multiply-adds on 2 threads (85)`; of operations and bytes the one whose rate binds */
export function rate({ msMedian, operations, bytes, share, machineRate }: Measurement): string {
  const [amount, unit] = operations === undefined || machineRate?.unit === 'bytes' ? [bytes, 'GB/s'] : [operations, 'GFLOP/s']
  if (msMedian === undefined || amount === undefined) return ''
  const reached = `${round(amount / msMedian / 1e6)} ${unit}`
  return machineRate === undefined || share === undefined
    ? reached
    : `${reached}, ${round(share * 100)} % of ${machineRate.of} (${round(machineRate.value / 1e9)})`
}
