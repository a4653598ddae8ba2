import { basename } from 'node:path'
import { round, rows } from '../markdown.js'
import { chart } from './chart.js'
import { goals, wrong } from './goals.js'
import type { Check, Result, Results } from './results.js'

/** The page of a run as it stands in `file`, and its chart beside it: texts by path. */
export function pageFiles(file: string, run: Results): Map<string, string> {
  const picture = file.replace(/(\.md)?$/, '.svg')
  return new Map([
    [file, page(run, basename(picture))],
    [picture, chart(run.results)],
  ])
}

/** The goals, the check of its inputs and answers, then every stage, and PyTorch beside it. */
function page(run: Results, chartFile: string): string {
  const { machine, commit, date, quick, results, checks, failures, notes } = run
  const own = results.filter(({ peer }) => peer === undefined)
  const models = [...new Set(own.map(({ model }) => model))]
  const rates = [
    `a copy moves ${terabytes(machine.copyBytesPerSecond)}, a read ${terabytes(machine.readBytesPerSecond)}`,
    machine.matrixOperationsPerSecond === undefined
      ? ''
      : `bfloat16 products of what shared memory holds run at ${teraflops(machine.matrixOperationsPerSecond)}`,
    machine.torchMatrixOperationsPerSecond === undefined
      ? ''
      : `a product of two matrices of 8192 by 8192 in PyTorch ${machine.torch} at ${teraflops(machine.torchMatrixOperationsPerSecond)}`,
  ].filter((rate) => rate !== '')
  return [
    '# Benchmarks on a GPU',
    `On one ${machine.gpu} (${machine.multiprocessors} multiprocessors, ${Math.round(machine.memoryBytes / 2 ** 30)} GiB), CUDA ${machine.cudaRuntime}, a driver for CUDA ${machine.cudaDriver}, laprox ${machine.laprox}, commit ${commit}, ${date.slice(0, 10)}. In the same run ${rates.join('; ')}.`,
    ...(quick ? ['**A quick run: sizes are small, and the figures say nothing about speed.**'] : []),
    "This page is made of a run's JSON: `npm run bench:gpu -- --json FILE --markdown docs/benchmarks-gpu.md`, or `npm run bench:gpu -- --from FILE --markdown docs/benchmarks-gpu.md` without measuring again.",
    'Whole models in bfloat16: d 128, a window of 32 queries, 5 % kept, max-pooling over 7 tokens, 4 sinks, one sequence, keys and values contiguous. Times are CUDA events around the calls on one stream: the median of at least 30 runs after warm-up (10 for what takes longer than 20 ms), the second level cache overwritten before each, the host ahead of the device, and half a second of rest before the first, so that no figure depends on how warm others have made the card. *Floor*: what the stage must at least read, write, multiply and add, phase by phase, at the rates above; for an eviction that is one scan of the keys (and of the values, where their norms are not kept), the rows of the exact scores that were computed, two reads of the scores, and the kept rows twice.',
    `![Milliseconds of laprox and PyTorch, Llama-3.1-8B, 131,072 tokens](${chartFile})`,
    '## Goals',
    rows(
      ['stage', 'what', 'tokens', 'at most', 'measured', 'met'],
      goals(run).map(({ stage, what, n, limitMs, measuredMs, met }) => [
        `\`${stage}\``,
        what,
        count(n),
        `${round(limitMs)} ms`,
        measuredMs === undefined ? 'not measured' : `${beside(measuredMs, limitMs)} ms`,
        met ? 'met' : '**not met**',
      ]),
    ),
    '## Inputs and answers',
    "*Peaked* inputs come from a seeded generator whose attention has needle-lm's statistics: of the entries, 2.2 to 2.6 % have a bound from exact attention norms above the threshold (*above*), and the scan's one read leaves 5 to 11 % of candidates. *Diffuse* ones are Gaussian, and nothing can be pruned. Before anything is timed, the selection from the cache is held against the one by all exact scores, token by token, and compacted rows against the cache's; `evict-replay` is an eviction captured as a CUDA graph and replayed with other lengths, held against calls of these lengths.",
    rows(
      ['model', 'tokens', 'input', 'stage', 'path', 'above', 'candidates', 'exact scores', 'selection'],
      checks.map((check) => checkRow(check)),
    ),
    ...models.flatMap((model) => section(model, results)),
    ...(failures.length === 0
      ? []
      : [
          '## Not measured',
          rows(
            ['model', 'stage', 'why'],
            failures.map(({ model, n, input, stage, error }) => [[model, n, input].join(' '), stage, error]),
          ),
        ]),
    ...notes,
  ]
    .join('\n\n')
    .concat('\n')
}

/** One result as a line for a terminal. */
export function line({ model, n, input, keep, stage, variant, kernels, peer, ...result }: Result): string {
  const { medianUs, p10Us, p90Us, share, candidates, entries } = result
  const what = [model, n, input, stage, keep === undefined || keep === 0 ? '' : `keep ${keep}`, variant, kernels, peer]
    .filter((part) => part)
    .join(' ')
  const reached = share === undefined ? '' : `, ${round(100 * share)} % of its floor's speed`
  const pruned = candidates === undefined || !entries ? '' : `, ${round((100 * candidates) / entries)} % candidates`
  return `${what}: ${round(medianUs / 1000)} ms (${round(p10Us / 1000)} to ${round(p90Us / 1000)})${reached}${pruned}`
}

function section(model: string, results: readonly Result[]): string[] {
  const own = results.filter((result) => result.model === model && result.peer === undefined)
  const peers = results.filter((result) => result.model === model && result.peer !== undefined)
  const { layers, measuredLayers } = own[0]!
  return [
    `## ${model}`,
    ...(layers === measuredLayers
      ? []
      : [`Measured with ${measuredLayers} of its ${layers} layers, which fit beside their scratch memory; times are scaled to all.`]),
    rows(
      ['stage', 'tokens', 'input', 'median (p10 to p90)', 'floor', 'share', 'GB', 'TFLOP', 'candidates', 'scratch'],
      own.map((result) => resultRow(result)),
    ),
    ...(peers.length === 0
      ? []
      : [
          'The same in PyTorch, layer by layer, a few layers scaled to all (topk and sort: all scores at once, without pooling):',
          rows(
            ['stage', 'tokens', 'what', 'median (p10 to p90)', 'layers'],
            peers.map(({ stage, n, variant, peer, measuredLayers, ...times }) => [
              `\`${stage}\``,
              count(n),
              [peer === 'torch-eager' ? 'eager' : 'compiled', variant].filter((part) => part).join(', '),
              time(times),
              String(measuredLayers),
            ]),
          ),
        ]),
  ]
}

function resultRow(result: Result): string[] {
  const { stage, kernels, keep, n, input, floorUs, share, bytes, operations, candidates, entries, path, workspaceBytes, workspaceLimit, graphUs } =
    result
  const name = [`\`${stage}\``, stage === 'compact' ? `${100 * keep!} %` : '', kernels ?? ''].filter((part) => part !== '').join(' ')
  return [
    name,
    count(n),
    input ?? '',
    time(result) + (graphUs === undefined ? '' : `; as a graph ${round(graphUs / 1000)}`),
    floorUs === undefined ? '' : `${round(floorUs / 1000)} ms`,
    share === undefined ? '' : `${round(100 * share)} %`,
    bytes === undefined ? '' : round(bytes / 1e9),
    operations ? round(operations / 1e12) : '',
    path === 'full' ? 'full path' : candidates === undefined || !entries ? '' : `${round((100 * candidates) / entries)} %`,
    workspaceBytes === undefined ? '' : `${Math.ceil(workspaceBytes / 2 ** 20)} of ${Math.floor(workspaceLimit! / 2 ** 20)} MiB`,
  ]
}

function checkRow(check: Check): string[] {
  const { model, n, input, stage, kernels, path, aboveThreshold, candidates, entries, exactScores } = check
  const percent = (of: number) => `${round((100 * of) / entries)} %`
  return [
    model,
    count(n),
    input,
    `\`${stage}\`${kernels === undefined ? '' : ` ${kernels}`}`,
    path,
    `${round(100 * aboveThreshold)} %`,
    percent(candidates),
    percent(exactScores),
    wrong(check) ?? 'the same, to the bit',
  ]
}

/** Rounded, but not to the limit that it missed. */
function beside(value: number, limit: number): string {
  return round(value) === round(limit) ? value.toPrecision(4) : round(value)
}

function time({ medianUs, p10Us, p90Us }: Pick<Result, 'medianUs' | 'p10Us' | 'p90Us'>): string {
  return `${round(medianUs / 1000)} ms (${round(p10Us / 1000)} to ${round(p90Us / 1000)})`
}

function terabytes(rate: number): string {
  return `${round(rate / 1e12)} TB/s`
}

function teraflops(rate: number): string {
  return `${Math.round(rate / 1e12)} TFLOP/s`
}

function count(n: number): string {
  return n.toLocaleString('en-US')
}
