import { readFile, writeFile } from 'node:fs/promises'
import { promisify } from 'node:util'
import { gzip } from 'node:zlib'
import type { Integers } from '../cache.js'
import { object, wrong } from '../check.js'
import { LaproxError, show, suggest } from '../errors.js'
import type { EvictReport } from '../evict.js'
import type { Fidelity } from '../fidelity.js'
import { replaceFile } from '../file.js'
import { type Policy, validatePolicy } from '../policy.js'
import { Scores } from '../score.js'
import { Selection, type SelectReport } from '../selection.js'
import { distributionOf } from './distribution.js'
import { Entries } from './entries.js'
import { grouped } from './format.js'
import { binOf, markEntries } from './mask.js'
import { type Payload, pack } from './payload.js'
import { figures, policyRows, reportRows } from './tables.js'

/** What a report tells of. */
export interface ReportContents {
  /** The page's. */
  readonly title: string
  /** What decided. */
  readonly policy: Policy
  /** What was kept; in host memory. */
  readonly selection: Selection
  /** How it came about. */
  readonly report: EvictReport | SelectReport
  /** Entries that each segment had, [segments], or one number for all. Default: those of `scores`. */
  readonly lengths?: number | Integers | undefined
  /** Position of each entry that there was, the segments one after the other. Default: those of `scores`, or the index in the segment. */
  readonly positions?: Int32Array | undefined
  /** [S] tokens that each sequence had read. Default: those of `scores`, or the longest segment. Required with `positions`. */
  readonly contextLengths?: Integers | undefined
  /** The scores that were ranked, in host memory, not pooled: for their distribution. */
  readonly scores?: Scores | undefined
  /** How far each layer's output moves. */
  readonly fidelity?: Fidelity | undefined
  /** Text of the token at each position, of a selection of one sequence. */
  readonly tokens?: readonly string[] | undefined
  /** Whatever else is to be told, by name: the device, the model, versions. */
  readonly facts?: Readonly<Record<string, string>> | undefined
}

/** What became of a report. */
export interface ReportSummary {
  /** Of the file. */
  readonly bytes: number
  /** Sentences that say what was too large for a browser, and how it was thinned out; the page says the same. */
  readonly thinned: readonly string[]
}

/** Token texts that a page may hold: more of them is more than anybody reads. */
const maxTokens = 2 ** 18
const maxCharacters = 2 ** 22

/**
 * Writes a page that shows what a policy kept: where, how much of each head, by which scores, at which error. It is one HTML file that
 * any browser of the last years opens without a network. The file is replaced as a whole, or not at all.
 *
 * @throws LaproxError (as a rejection) `INVALID_ARGUMENT`, `OUT_OF_BOUNDS` for contents that do not fit together, `DEVICE_MISMATCH` for
 *   a selection or scores in the memory of a GPU, `OUT_OF_MEMORY`, `IO` where the file cannot be written
 */
export async function writeReport(file: string, contents: ReportContents): Promise<ReportSummary> {
  check(contents)
  const { selection, scores, report, fidelity } = contents
  const policy = validatePolicy(contents.policy)
  const entries = new Entries(selection, contents)
  const texts = checkTokens(contents.tokens, entries)
  const bin = binOf(entries)
  const shown = firstTexts(texts)
  const thinned = thinnedOut(entries, bin, texts.length, shown.length)
  const marks = await markEntries(entries, selection, bin)
  const count = entries.offsets.at(-1)!
  const payload: Payload = {
    title: contents.title,
    policy: policy.name,
    figures: figures(count, selection.entries, report, fidelity),
    layers: entries.layers,
    sequences: entries.sequences,
    kvHeads: entries.kvHeads,
    contexts: [...entries.contexts],
    lengths: [...entries.lengths],
    counts: [...selection.counts],
    bin,
    ...(scores === undefined ? {} : { distribution: await distributionOf(entries, scores, selection, policy) }),
    ...(fidelity === undefined ? {} : { fidelity }),
    ...(shown.length === 0 ? {} : { tokens: shown }),
    tables: [
      { name: 'Policy', rows: policyRows(policy) },
      { name: 'Run', rows: reportRows(report, count, selection.entries) },
      { name: 'Facts', rows: Object.entries(contents.facts ?? {}) },
    ].filter(({ rows }) => rows.length > 0),
    thinned,
  }
  const data = await promisify(gzip)(pack({ payload, ...marks }))
  const page = await readPage()
  const fill: Record<string, () => string> = { title: () => escapeHtml(contents.title), data: () => data.toString('base64') }
  const html = Buffer.from(page.replace(/\{\{(title|data)\}\}/g, (_, name: string) => fill[name]!()))
  await replaceFile(file, (temporary) => writeFile(temporary, html))
  return { bytes: html.length, thinned }
}

const names = ['title', 'policy', 'selection', 'report', 'lengths', 'positions', 'contextLengths', 'scores', 'fidelity', 'tokens', 'facts']

function check(contents: ReportContents): void {
  object(contents, 'contents', 'an object with title, policy, selection and report')
  for (const key of Object.keys(contents)) {
    if (!names.includes(key)) throw new LaproxError('INVALID_ARGUMENT', `contents: unknown field ${show(key)}; ${suggest(key, names)}`)
  }
  const { title, selection, report, scores, fidelity, facts } = contents
  if (typeof title !== 'string') throw wrong('title', title, 'a string')
  if (!(selection instanceof Selection)) throw wrong('selection', selection, 'a Selection')
  void selection.tokens // throws where a GPU has them
  object(report, 'report', 'what evict, select or selectFrom report')
  if (report.kept !== selection.entries) {
    throw new LaproxError('INVALID_ARGUMENT', `report tells of ${report.kept} kept entries; expected those of the selection, ${selection.entries}`)
  }
  if (scores !== undefined) {
    if (!(scores instanceof Scores)) throw wrong('scores', scores, 'Scores')
    void scores.data // likewise
  }
  if (fidelity !== undefined) {
    object(fidelity, 'fidelity', 'the relative errors of the layers')
    if (fidelity.layers?.length !== selection.layers) {
      throw new LaproxError(
        'INVALID_ARGUMENT',
        `fidelity tells of ${fidelity.layers?.length} layers; expected those of the selection, ${selection.layers}`,
      )
    }
  }
  if (facts !== undefined) {
    object(facts, 'facts', 'an object of strings')
    for (const [name, value] of Object.entries(facts)) if (typeof value !== 'string') throw wrong(`facts[${show(name)}]`, value, 'a string')
  }
}

function checkTokens(tokens: readonly string[] | undefined, { sequences, contexts }: Entries): readonly string[] {
  if (tokens === undefined) return []
  if (sequences > 1) throw new LaproxError('INVALID_ARGUMENT', `tokens are those of one sequence; the selection has ${sequences}`)
  if (!Array.isArray(tokens) || tokens.length !== contexts[0]) {
    throw new LaproxError('INVALID_ARGUMENT', `tokens has ${tokens?.length} texts; expected one per position, ${contexts[0]}`)
  }
  for (const [i, text] of tokens.entries()) if (typeof text !== 'string') throw wrong(`tokens[${i}]`, text, 'a string')
  return tokens
}

/** As many texts as a page may hold. */
function firstTexts(texts: readonly string[]): readonly string[] {
  let [count, characters] = [0, 0]
  for (; count < Math.min(texts.length, maxTokens); count++) {
    characters += texts[count]!.length
    if (characters > maxCharacters) break
  }
  return texts.slice(0, count)
}

function thinnedOut({ lengths, contexts }: Entries, bin: number, tokens: number, shown: number): string[] {
  const sentences: string[] = []
  if (bin > 1) {
    const positions = `${lengths.length} heads of ${grouped(Math.max(...contexts))} positions`
    sentences.push(`${positions} are too many for a browser one by one: what is kept was counted for every ${grouped(bin)} positions together.`)
  }
  if (shown < tokens) {
    sentences.push(`The text of ${grouped(tokens)} tokens is too long for a browser: it ends after the first ${grouped(shown)}.`)
  }
  return sentences
}

/** The built page, from dist/ wherever this file is run from. */
async function readPage(): Promise<string> {
  try {
    return await readFile(new URL('../../dist/report/page.html', import.meta.url), 'utf8')
  } catch (cause) {
    throw new LaproxError('INTERNAL', `the page of reports is missing; npm run build:ts makes it: ${(cause as Error).message}`, { cause })
  }
}

const entities: Readonly<Record<string, string>> = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;' }

function escapeHtml(text: string): string {
  return text.replace(/[&<>"']/g, (character) => entities[character]!)
}
