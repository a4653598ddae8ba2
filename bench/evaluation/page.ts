import { percent } from '#lib/cli/table'
import type { Contender } from '#lib/evaluation/contenders'
import { estimate, mean } from '#lib/evaluation/estimate'
import type { Evaluation } from '#lib/evaluation/evaluation'
import { lineChart } from '../chart.js'
import { rows } from '../markdown.js'
import { type Comparison, compareWithReference, reference } from './reference.js'

/** The page of an evaluation and its charts: texts by the names of files. */
export function pageFiles(evaluation: Evaluation): Map<string, string> {
  const files = new Map([['README.md', page(evaluation)]])
  for (const task of drawn(evaluation)) files.set(`${task.name}.svg`, chart(evaluation, task))
  return files
}

/** Tasks with a chart: all but the easiest, which almost everybody answers. */
function drawn({ tasks }: Evaluation): Evaluation['tasks'] {
  return tasks.filter(({ name }) => name !== 'single')
}

function page(evaluation: Evaluation): string {
  const { setup, date, tasks, contenders } = evaluation
  const prompts = tasks[0]!.full.length
  const of = (table: Contender['table']) => namesOf(evaluation, table)
  const full = tasks.map(({ name, judgedBy, full }) =>
    judgedBy === 'loss' ? `${mean(full).toFixed(3)} nats on ${name}` : `${mean(full).toFixed(2)} of ${name}`,
  )
  return `${[
    '# Evaluation',
    `What a language model still answers right from what each policy leaves of its KV cache. [needle-lm](../../examples/needle/model/README.md), a decoder of 6 M parameters, reads ${prompts} prompts of about 4,090 tokens for each of ${tasks.length} tasks; ${contenders.length} contenders (a policy and a share each) evict from that cache, by laprox's own scores, selection and compaction; and the model goes on from the compacted cache. [The presets](../../lib/policy.ts) say what each policy is.`,
    "```\nnpm run eval                                           # measures; writes results.json, this page and its charts\nnpm run eval -- --from docs/evaluation/results.json    # page and charts alone\nnpx laprox eval --model DIR                            # the same for a model's folder of your own\n```",
    `On ${setup.cpu}, ${setup.cores} cores, ${setup.platform}, Node ${setup.node}, ONNX Runtime ${setup.onnxruntime}, laprox ${setup.laprox} (${setup.instructionSet})${setup.commit === undefined ? '' : `, commit ${setup.commit}`}, ${date.slice(0, 10)}. Every figure, prompt by prompt, is in [results.json](results.json).`,
    `With its full cache the model reaches ${full.join(', ')}.`,
    '## The loss on plain text',
    ...drawn(evaluation)
      .filter(({ judgedBy }) => judgedBy === 'loss')
      .map(({ name }) => `![Rise of the next-token loss by the share that is kept, a line a policy](${name}.svg)`),
    `Rise over the full cache's loss in nats, with the standard error of the differences prompt by prompt:`,
    lossTable(evaluation, of('presets')),
    '## Right answers',
    ...drawn(evaluation)
      .filter(({ judgedBy }) => judgedBy === 'answer')
      .map(({ name }) => `![Share of ${name} answered right by the share that is kept, a line a policy](${name}.svg)`),
    `Share of answers that are right in every token, ${answerTasks(evaluation).join(' / ')}. With ${prompts} prompts the standard error is ${standardError(0.5, prompts)} in the middle and ${standardError(0.1, prompts)} at 0.10; policies answer the same prompts, so that differences between them are surer than that.`,
    answerTable(evaluation, of('presets')),
    ...extraSection(
      evaluation,
      'window',
      'Windows',
      "Queries whose attention decides, the prompt's last; so many tokens at its end are also protected. At 1.5 % of these prompts 64 protected tokens would leave no room, hence the larger shares.",
      ['laprox', 'snapkv'],
    ),
    ...extraSection(evaluation, 'pooling', 'Poolings', 'Neighbouring tokens whose scores become one by their maximum.', ['laprox']),
    ...referenceSection(evaluation),
    '## What this shows, and what it does not',
    [
      '- It compares rules, on one model, under equal conditions. It promises nothing about a large model: this one has 6 M parameters, 6 layers and 2 KV heads a layer, and was trained in minutes on these very tasks and on the kind of text that it is tested with. Its full cache answers everything right, so that what is lost is lost by the eviction.',
      '- 4,090 tokens are a short context for what eviction is meant for. How attention spreads over 100,000 tokens is not seen here.',
      "- The question stands at the end of the prompt, inside the window, and eviction comes after it. Policies that look at the window know what will be asked. Where a cache is compressed before the question is known they do not, and nothing here says what that costs ([the demo's notes](../../examples/needle/README.md) have one figure: without the prompt's last token, `snapkv` falls from 100 % to about 70 % of `single`).",
      '- `passage` asks for tokens that the window does not look at yet, since each is found only once the one before it is written: no policy here is made for that.',
      "- The peers are laprox's presets of their published rules, with a window of 32 and 4 sinks for all but `tova`, combined over the group before pooling; none is its authors' code.",
      '- One eviction a prompt. Evicting again while the model writes is not measured.',
    ].join('\n'),
    '## How it is measured',
    [
      "1. A prompt is read to its end, its last token too, in pieces of 512, and its last 64 queries are kept: a policy's window is the last of these.",
      '2. Policies of one score rule and window rank the same scores, which are computed once; each then selects and compacts by itself. The selection is that of `evict`, to the bit.',
      '3. Heads keep different numbers of rows: they are padded to the longest of their layer for the graph, and a mask takes the padding out ([`laprox/onnxruntime`](../../lib/onnxruntime.ts)).',
      "4. The answer's tokens are read in one call after what is left, at the positions where they always would have stood. An answer is right when each of its tokens is the most likely one after those before it, which is when greedy decoding writes it. Its first token follows from the prompt's last logits, which no eviction has touched. A text is judged by the mean loss of its tokens but the first.",
      '5. Every process measures its prompts on one thread. Results do not depend on how many there are.',
    ].join('\n'),
  ].join('\n\n')}\n`
}

/** Contenders of a table, each name once. */
function namesOf({ contenders }: Evaluation, table: Contender['table']): string[] {
  return [...new Set(contenders.filter((one) => one.table === table).map(({ name }) => name))]
}

function keepsOf({ contenders }: Evaluation, names: readonly string[]): number[] {
  return [...new Set(contenders.filter(({ name }) => names.includes(name)).map(({ keep }) => keep))].sort((a, b) => a - b)
}

function lossTable(evaluation: Evaluation, names: readonly string[], keeps: readonly number[] = keepsOf(evaluation, names)): string {
  const { name: task } = evaluation.tasks.find(({ judgedBy }) => judgedBy === 'loss')!
  return contenderTable(evaluation, names, keeps, (contender) => {
    const found = estimate(evaluation, contender, task)
    return found === undefined ? '–' : `${signed(found.value)} ± ${found.error.toFixed(2)}`
  })
}

function answerTable(evaluation: Evaluation, names: readonly string[], keeps: readonly number[] = keepsOf(evaluation, names)): string {
  return contenderTable(evaluation, names, keeps, (contender) =>
    answerTasks(evaluation)
      .map((task) => estimate(evaluation, contender, task)?.value.toFixed(2) ?? '–')
      .join(' / '),
  )
}

/** A line a name, a column a share. */
function contenderTable(
  { contenders }: Evaluation,
  names: readonly string[],
  keeps: readonly number[],
  cell: (contender: Evaluation['contenders'][number]) => string,
): string {
  return rows(
    ['policy', ...keeps.map(percent)],
    names.map((name) => [
      `\`${name}\``,
      ...keeps.map((keep) => {
        const contender = contenders.find((one) => one.name === name && one.keep === keep)
        return contender === undefined ? '' : cell(contender)
      }),
    ]),
  )
}

function answerTasks({ tasks }: Evaluation): string[] {
  return tasks.filter(({ judgedBy }) => judgedBy === 'answer').map(({ name }) => name)
}

/** The contenders of an extra table beside the presets that they vary, at the shares that all of them have. */
function extraSection(evaluation: Evaluation, table: Contender['table'], title: string, what: string, presets: readonly string[]): string[] {
  const variants = namesOf(evaluation, table)
  if (variants.length === 0) return []
  const names = presets.flatMap((preset) => [preset, ...variants.filter((name) => name.startsWith(`${preset},`))])
  const keeps = keepsOf(evaluation, variants)
  return [
    `## ${title}`,
    `${what} \`${presets.join('` and `')}\` without a note ${presets.length > 1 ? 'are' : 'is'} the preset: ${standardOf(evaluation, table, presets[0]!)}.`,
    lossTable(evaluation, names, keeps),
    answerTable(evaluation, names, keeps),
  ]
}

function standardOf({ contenders }: Evaluation, table: Contender['table'], preset: string): string {
  const { policy } = contenders.find(({ name }) => name === preset)!
  const { pooling } = policy
  return table === 'window' ? `a window of ${policy.window}` : pooling.kind === 'none' ? 'no pooling' : `${pooling.kind} ${pooling.width}`
}

function referenceSection(evaluation: Evaluation): string[] {
  const comparisons = compareWithReference(evaluation)
  if (comparisons.length === 0) return []
  const count = (verdict: Comparison['verdict']) => comparisons.filter((one) => one.verdict === verdict).length
  const tasks = evaluation.tasks.map(({ name }) => name)
  const lines = [...new Set(comparisons.map(({ rule, keep }) => `${rule} ${keep}`))].map((line) => {
    const cells = comparisons.filter(({ rule, keep }) => `${rule} ${keep}` === line)
    const { rule, contender, keep } = cells[0]!
    return [
      rule,
      `\`${contender}\``,
      percent(keep),
      ...tasks.map((task) =>
        comparisonCell(
          evaluation,
          cells.find((cell) => cell.task === task),
        ),
      ),
    ]
  })
  const off = comparisons.filter(({ verdict }) => verdict === 'different')
  return [
    '## Against the reference',
    `The figures of ${reference.origin}, of ${reference.prompts} prompts a task, beside those of the first ${reference.prompts} prompts here. Of ${comparisons.length} figures ${count('same')} are the same to the digits that the reference gives (=), ${count('noise')} differ by less than two standard errors (≈), and ${count('different')} by more (≠). The standard errors are those of a difference between independent samples: binomial for shares, and for losses that of the differences prompt by prompt. The prompts are the same ones, so that even ≈ has to come from somewhere: \`random\` draws other entries; elsewhere float32 sums in another order, which moves entries that are all but tied and with them a prompt now and then.`,
    ...(off.length === 0
      ? []
      : [
          `Beyond noise: ${off.map(({ contender, keep, task, reference, here }) => `\`${contender}\` at ${percent(keep)} in ${task} (${reference.toFixed(2)} there, ${here.toFixed(3)} here)`).join('; ')}.`,
        ]),
    rows(['rule of the reference', 'here', 'kept', ...tasks], lines),
  ]
}

/** `0.94 = 0.94` */
function comparisonCell({ tasks }: Evaluation, comparison: Comparison | undefined): string {
  if (comparison === undefined) return ''
  const { judgedBy } = tasks.find(({ name }) => name === comparison.task)!
  const show = (value: number) => (judgedBy === 'loss' ? signed(value) : value.toFixed(2))
  const text = `${show(comparison.reference)} ${{ same: '=', noise: '≈', different: '≠' }[comparison.verdict]} ${show(comparison.here)}`
  return comparison.verdict === 'different' ? `**${text}**` : text
}

function chart(evaluation: Evaluation, { name: task, judgedBy }: Evaluation['tasks'][number]): string {
  const names = namesOf(evaluation, 'presets')
  const lines = names.map((name) => ({
    name,
    points: evaluation.contenders
      .filter((one) => one.name === name)
      .flatMap((contender): [number, number][] => {
        const found = estimate(evaluation, contender, task)
        return found === undefined ? [] : [[contender.keep, found.value]]
      }),
  }))
  return lineChart({
    title: judgedBy === 'loss' ? `Rise of the next-token loss on ${task}` : `Answers of ${task} that are right`,
    x: { name: 'share of the cache that is kept', log: true, ticks: keepsOf(evaluation, names), format: percent },
    y:
      judgedBy === 'loss' ? { name: 'nats over the full cache', format: (value) => value.toFixed(1) } : { name: 'share of prompts', format: percent },
    lines: lines.filter(({ points }) => points.length > 0),
  })
}

/** 0.082 -> '+0.08' */
function signed(nats: number): string {
  return `${nats < 0 ? '−' : '+'}${Math.abs(nats).toFixed(2)}`
}

function standardError(share: number, prompts: number): string {
  return Math.sqrt((share * (1 - share)) / prompts).toFixed(2)
}
