import type { Goal, Measurement, Results } from './measurement.js'

/** The page of a run: goals first, then everything that was measured, each beside the command that prints it. */
export function table({ machine, commit, date, quick, results }: Results): string {
  const names = [...new Set(results.map(({ benchmark }) => benchmark))]
  return [
    '# Benchmarks',
    `On ${machine.cpu}, ${machine.cores} cores, ${machine.memoryGiB} GiB, ${machine.platform}, Node ${machine.node}, laprox ${machine.laprox} (${machine.instructionSet}), commit ${commit}, ${date.slice(0, 10)}.`,
    ...(quick ? ['**A quick run: sizes are small, and the figures say nothing about speed.**'] : []),
    "This page is made of a run's JSON: `npm run bench -- --json FILE --markdown docs/benchmarks.md`, or `npm run bench -- --from FILE --markdown docs/benchmarks.md` without measuring again. Each command below prints the figures beside it.",
    '## Goals',
    rows(
      ['what', 'wanted', 'measured', 'met', 'command'],
      results.flatMap((result) => (result.goals ?? []).map((goal) => goalRow(result, goal))),
    ),
    ...names.flatMap((name) =>
      section(
        name,
        results.filter(({ benchmark }) => benchmark === name),
      ),
    ),
  ]
    .join('\n\n')
    .concat('\n')
}

/** One measurement as lines for a terminal. */
export function lines(measurement: Measurement): string {
  const { benchmark, name, figures = {}, goals = [] } = measurement
  return [
    `${benchmark}: ${name}`,
    `  ${parameters(measurement)}`,
    `  ${[time(measurement), rate(measurement)].filter((part) => part !== '').join(', ')}`,
    ...Object.entries(figures).map(([figure, value]) => `  ${figure} ${round(value)}`),
    ...goals.map((goal) => `  ${goal.what}: ${measured(goal)}, wanted ${wanted(goal)}: ${goal.met ? 'met' : 'NOT MET'}`),
  ].join('\n')
}

function section(name: string, results: readonly Measurement[]): string[] {
  return [
    `## ${name}`,
    `\`\`\`\n${command(name)}\n\`\`\``,
    rows(
      ['what', 'median (p10 to p90)', 'rate', 'figures'],
      results.map((result) => [
        `${result.name}<br>${parameters(result)}`,
        time(result),
        rate(result),
        Object.entries(result.figures ?? {})
          .map(([figure, value]) => `${figure} ${round(value)}`)
          .join('<br>'),
      ]),
    ),
    ...new Set(results.flatMap(({ note }) => (note === undefined ? [] : [`${note[0]!.toUpperCase()}${note.slice(1)}.`]))),
  ]
}

function goalRow({ benchmark, name }: Measurement, goal: Goal): string[] {
  return [`${name}: ${goal.what}`, wanted(goal), measured(goal), goal.met ? 'met' : '**not met**', `\`${command(benchmark)}\``]
}

function command(benchmark: string): string {
  return `npm run bench -- --only ${benchmark}`
}

function rows(head: readonly string[], body: readonly (readonly string[])[]): string {
  return [head, head.map(() => '---'), ...body].map((cells) => `| ${cells.join(' | ')} |`).join('\n')
}

function wanted({ wanted, limit, unit }: Goal): string {
  return `${wanted} ${round(limit)} ${unit}`
}

function measured({ value, unit }: Goal): string {
  return `${round(value)} ${unit}`
}

function parameters({ parameters }: Measurement): string {
  return Object.entries(parameters)
    .map(([name, value]) => `${name} ${value}`)
    .join(', ')
}

function time({ msMedian, msP10, msP90 }: Measurement): string {
  return msMedian === undefined ? '' : `${round(msMedian)} ms (${round(msP10!)} to ${round(msP90!)})`
}

/** `52.1 GFLOP/s, 61.3 % of multiply-adds on 2 threads` */
function rate({ msMedian, operations, bytes, share, machineRate }: Measurement): string {
  const amount = operations ?? bytes
  if (msMedian === undefined || amount === undefined) return ''
  const reached = `${round(amount / msMedian / 1e6)} ${operations === undefined ? 'GB/s' : 'GFLOP/s'}`
  return machineRate === undefined || share === undefined
    ? reached
    : `${reached}, ${round(share * 100)} % of ${machineRate.of} (${round(machineRate.value / 1e9)})`
}

/** Three digits, or all of a whole number. */
function round(value: number): string {
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(3)))
}
