// Whether the documentation holds the figures of the results that are kept: generated pages and charts, and in other files what
// stands between `<!-- figures: NAME -->` and `<!-- /figures -->`.
// tsx scripts/check-figures.ts [--write]     --write: puts them there
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { estimate, mean } from '#lib/evaluation/estimate'
import type { Evaluation } from '#lib/evaluation/evaluation'
import { pageFiles as evaluationPageFiles } from '../bench/evaluation/page.js'
import { find } from '../bench/gpu/goals.js'
import { pageFiles as gpuPageFiles } from '../bench/gpu/page.js'
import type { Results as GpuResults, Result } from '../bench/gpu/results.js'
import { roughly, rows } from '../bench/markdown.js'
import type { Results } from '../bench/measurement.js'
import { pageFiles } from '../bench/page.js'
import { suggest } from '../lib/errors.js'

/** A file that differs from what the results make of it. */
export interface Outdated {
  readonly file: string
  /** What should stand there. */
  readonly text: string
  readonly why: string
}

/** The files below `root` that differ. Throws where a file marks figures that nobody makes. */
export function outdated(root: string): Outdated[] {
  const read = (file: string) => readFileSync(join(root, file), 'utf8')
  const cpu = JSON.parse(read('bench/results/cpu.json')) as Results
  const gpu = JSON.parse(read('bench/results/h200.json')) as GpuResults
  const evaluation = JSON.parse(read('docs/evaluation/results.json')) as Evaluation
  const pages = new Map([
    ...pageFiles('docs/benchmarks.md', cpu),
    ...gpuPageFiles('docs/benchmarks-gpu.md', gpu),
    ...[...evaluationPageFiles(evaluation)].map(([file, text]) => [`docs/evaluation/${file}`, text] as const),
  ])
  const figures = { ...cpuFigures(cpu), ...gpuFigures(gpu), ...qualityFigures(evaluation) }
  return [
    ...[...pages].flatMap(([file, text]) => {
      const found = read(file)
      return found === text ? [] : [{ file, text, why: difference(found, text) }]
    }),
    ...documents(root)
      .filter((file) => !pages.has(file))
      .flatMap((file) => fill(file, read(file), figures)),
  ]
}

/** By name; made when a document asks for them. */
export type Figures = Readonly<Record<string, () => string>>

/** Of one layer of Llama-3.1-8B with 32,768 tokens, its scores times 32 where they are selected; in milliseconds. */
function cpuFigures({ results }: Results): Figures {
  const ms = (wanted: string) => {
    const found = results.find(({ name }) => name === wanted)
    if (found?.msMedian === undefined) throw new Error(`bench/results/cpu.json has no time of '${wanted}'`)
    return roughly(found.msMedian)
  }
  return {
    'cpu-stages': () =>
      rows(
        ['', 'laprox', 'beside it'],
        [
          [
            'every joint score',
            ms('every exact joint score of one layer'),
            `ONNX Runtime ${ms('the same formula as an ONNX graph in onnxruntime-node')}`,
          ],
          ['whole eviction at 5 %', ms('eviction of 95 % of a generated cache of one Llama-3.1-8B layer'), ''],
          [
            'selecting 5 % of 8.4 million scores',
            ms('a selection of 5 % of all scores'),
            `std::nth_element ${ms('the same selection by std::nth_element and a scan in C++')}, JavaScript's sort ${ms('a sort of the same scores in JavaScript')}`,
          ],
        ],
      ),
  }
}

/** Of Llama-3.1-8B with 131,072 tokens, in milliseconds. */
function gpuFigures({ machine, results }: GpuResults): Figures {
  const ms = (wanted: Partial<Result>) => {
    const found = find(results, { model: 'Llama-3.1-8B', n: 131072, peer: undefined, kernels: undefined, ...wanted })
    if (found === undefined) throw new Error(`bench/results/h200.json has no result with ${JSON.stringify(wanted)}`)
    return roughly(found.medianUs / 1000)
  }
  const own = (stage: string, keep?: number) => ms({ stage, input: 'peaked', ...(keep !== undefined && { keep }) })
  const compiled = (stage: string, variant: string) => ms({ stage, variant, peer: 'torch-compiled' })
  const eager = (stage: string, variant: string) => ms({ stage, variant, peer: 'torch-eager' })
  return {
    'gpu-eviction': () => `${own('evict-kept-norms')} ms`,
    'gpu-stages': () =>
      rows(
        ['', 'laprox', `PyTorch ${/^\d+\.\d+/.exec(machine.torch!)}, compiled`, 'eager'],
        [
          ['whole eviction at 5 %, value norms kept / not kept', `${own('evict-kept-norms')} / ${own('evict')}`, '', ''],
          ['every joint score', own('score-joint'), compiled('score-joint', 'all pairs'), eager('score-joint', 'all pairs')],
          ['every SnapKV score', own('score-snapkv'), compiled('score-snapkv', ''), eager('score-snapkv', '')],
          ['selecting 5 % of 33.5 million scores', own('select'), '', eager('select', 'torch.topk, not pooled')],
          ['moving the kept rows', own('compact', 0.05), '', eager('compact', 'gather, as many of each head')],
        ],
      ),
  }
}

/** What needle-lm answers: all prompts at 5 %, and what the demo shows of the first 64. */
function qualityFigures(evaluation: Evaluation): Figures {
  const titles: Record<string, string> = { single: 'one code', multi: 'two codes', passage: 'passage', text: 'loss rise (nats)' }
  const policies = ['laprox', 'laprox-removal', 'laprox-bound', 'adakv', 'snapkv', 'streaming', 'random']
  const cells = (name: string, keep: number, prompts?: number) => {
    const contender = evaluation.contenders.find((one) => one.name === name && one.keep === keep)
    if (contender === undefined) throw new Error(`docs/evaluation/results.json has no '${name}' at ${keep}`)
    return evaluation.tasks.map((task) => {
      const { value } = estimate(evaluation, contender, task.name, prompts)!
      return `${task.judgedBy === 'loss' ? '+' : ''}${value.toFixed(2)}`
    })
  }
  const full = evaluation.tasks.map(({ judgedBy, full }) => (judgedBy === 'loss' ? '' : mean(full).toFixed(2)))
  const table = (shares: readonly number[], prompts?: number) =>
    rows(
      ['policy', 'kept', ...evaluation.tasks.map(({ name }) => titles[name]!)],
      [
        ['full cache', '100 %', ...full],
        ...shares.flatMap((keep) => policies.map((name) => [`\`${name}\``, `${Number((100 * keep).toFixed(1))} %`, ...cells(name, keep, prompts)])),
      ],
    )
  return { quality: () => table([0.05]), 'quality-64': () => table([0.05, 0.015], 64) }
}

const marked = /<!-- figures: (\S+) -->([\s\S]*?)<!-- \/figures -->/g

/** A document with its figures put in. Throws where it marks unknown ones, or a mark has no end. */
export function fill(file: string, text: string, figures: Figures): Outdated[] {
  const wrong: string[] = []
  const filled = text.replace(marked, (_, name: string, found: string) => {
    if (found.includes('<!-- figures')) throw new Error(`${file}: the mark of figures '${name}' has no end`)
    const make = Object.hasOwn(figures, name) ? figures[name] : undefined
    if (make === undefined) throw new Error(`${file}: there are no figures '${name}'; ${suggest(name, Object.keys(figures))}`)
    const made = make()
    const wanted = made.includes('\n') ? `\n${made}\n` : made // a table stands on lines of its own
    if (found !== wanted) wrong.push(`'${name}': ${difference(found, wanted)}`)
    return `<!-- figures: ${name} -->${wanted}<!-- /figures -->`
  })
  if (filled.replace(marked, '').includes('<!-- figures')) throw new Error(`${file}: a mark of figures has no end`)
  return wrong.length === 0 ? [] : [{ file, text: filled, why: wrong.join('; ') }]
}

/** The first lines that differ. */
function difference(found: string, wanted: string): string {
  const [left, right] = [found.split('\n'), wanted.split('\n')]
  const at = right.findIndex((line, i) => line !== left[i])
  return `"${left[at] ?? ''}" where the results have "${right[at] ?? ''}"`
}

/** Markdown that people write. */
function documents(root: string): string[] {
  const below = (folder: string) => readdirSync(join(root, folder), { recursive: true }).map((file) => `${folder}/${file}`)
  return ['README.md', ...below('docs'), ...below('examples')].filter((file) => file.endsWith('.md'))
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const root = resolve(dirname(fileURLToPath(import.meta.url)), '..')
  const write = process.argv.includes('--write')
  for (const { file, text, why } of outdated(root)) {
    if (write) writeFileSync(join(root, file), text)
    else process.exitCode = 1
    console.log(`${file}: ${write ? 'written' : why}`)
  }
  if (process.exitCode) console.log('npm run format writes the figures of the results.')
}
