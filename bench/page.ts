import { basename } from 'node:path'
import { round, rows } from './markdown.js'
import type { Goal, Measurement, Results } from './measurement.js'
import { type Sweep, sweepChart, sweeps } from './sweep.js'
import { measured, parameters, rate, time, wanted } from './table.js'

/** The page of a run as it stands in `file`, and its charts beside it: texts by path. */
export function pageFiles(file: string, run: Results): Map<string, string> {
  const chartFile = (of: string, along: string) => of.replace(/(\.md)?$/, `-${along}.svg`)
  const text = page(run, (along) => chartFile(basename(file), along))
  return new Map([[file, text], ...sweeps(run.results).map((sweep) => [chartFile(file, sweep.along), sweepChart(sweep)] as const)])
}

/** Goals, shares of what the machine can do, then everything that was measured, each beside the command that prints it. */
function page(run: Results, pictureOf: (along: string) => string): string {
  const { machine, commit, date, quick, results } = run
  const names = [...new Set(results.map(({ benchmark }) => benchmark))]
  return [
    '# Benchmarks',
    `On ${machine.cpu}, ${machine.cores} cores, ${machine.memoryGiB} GiB, ${machine.platform}, Node ${machine.node}, laprox ${machine.laprox} (${machine.instructionSet}), commit ${commit}, ${date.slice(0, 10)}.`,
    ...(quick ? ['**A quick run: sizes are small, and the figures say nothing about speed.**'] : []),
    "`npm run bench` measures all of it and writes the run's JSON, this page and its charts; `npm run bench -- --from bench/results/cpu.json` writes page and charts without measuring again. Each command below prints the figures beside it.",
    '## Goals',
    rows(
      ['what', 'wanted', 'measured', 'met', 'command'],
      results.flatMap((result) => (result.goals ?? []).map((goal) => goalRow(result, goal))),
    ),
    '## Shares of the machine',
    'What is reached of what the machine does at most, measured in the same run: multiply-adds on registers alone, reading memory that no cache holds, or memcpy of as many bytes. Where the processor multiplies numbers in bfloat16 faster than floats (AVX512-BF16, AMX), a share can be above 100 %.',
    rows(
      ['what', 'median', 'reached', 'at most', 'share'],
      results.flatMap((result) => shareRow(result)),
    ),
    ...names.flatMap((name) =>
      section(
        name,
        results.filter(({ benchmark }) => benchmark === name),
        pictureOf,
      ),
    ),
  ]
    .join('\n\n')
    .concat('\n')
}

function section(name: string, results: readonly Measurement[], pictureOf: (along: string) => string): string[] {
  const single = results.filter(({ along }) => along === undefined)
  return [
    `## ${name}`,
    `\`\`\`\n${command(name)}\n\`\`\``,
    ...(single.length > 0 ? [singleRows(single)] : []),
    ...sweeps(results).flatMap((sweep) => sweepSection(sweep, pictureOf(sweep.along))),
    ...new Set(results.flatMap(({ note }) => (note === undefined ? [] : [`${note[0]!.toUpperCase()}${note.slice(1)}.`]))),
  ]
}

function singleRows(results: readonly Measurement[]): string {
  return rows(
    ['what', 'median (p10 to p90)', 'rate', 'figures'],
    results.map((result) => [
      `${result.name}<br>${parameters(result.parameters)}`,
      time(result),
      rate(result),
      Object.entries(result.figures ?? {})
        .map(([figure, value]) => `${figure} ${round(value)}`)
        .join('<br>'),
    ]),
  )
}

/** Milliseconds. */
function sweepSection({ along, of, values, stages, fixed }: Sweep, picture: string): string[] {
  return [
    `### By ${of}`,
    `![Milliseconds of each stage by ${of}](${picture})`,
    rows(
      [along, ...stages.map(({ name }) => `${name} (ms)`)],
      values.map((value, i) => [value.toLocaleString('en-US'), ...stages.map(({ ms }) => round(ms[i]!))]),
    ),
    `${parameters(fixed)}.`,
  ]
}

function goalRow({ benchmark, name }: Measurement, goal: Goal): string[] {
  return [`${name}: ${goal.what}`, wanted(goal), measured(goal), goal.met ? 'met' : '**not met**', `\`${command(benchmark)}\``]
}

function shareRow({ name, msMedian, machineRate, share }: Measurement): string[][] {
  if (machineRate === undefined || share === undefined) return []
  const unit = machineRate.unit === 'operations' ? 'GFLOP/s' : 'GB/s'
  const rate = (value: number) => `${round(value / 1e9)} ${unit}`
  return [
    [name, `${round(msMedian!)} ms`, rate(share * machineRate.value), `${rate(machineRate.value)} (${machineRate.of})`, `${round(share * 100)} %`],
  ]
}

function command(benchmark: string): string {
  return `npm run bench -- --only ${benchmark}`
}
