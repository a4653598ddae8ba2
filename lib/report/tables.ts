import { bytes, duration } from '../cli/table.js'
import type { EvictReport } from '../evict.js'
import type { Policy, ScoreRule } from '../policy.js'
import type { SelectReport } from '../selection.js'
import { grouped, percent, positions, relative } from './format.js'
import type { Errors, Figure, Row } from './payload.js'

/** The numbers at the top of the page. */
export function figures(entries: number, kept: number, report: SelectReport | EvictReport, errors: Errors | undefined): Figure[] {
  const list: Figure[] = [
    { name: 'Kept', value: percent(entries === 0 ? 1 : kept / entries), note: `${grouped(kept)} of ${grouped(entries)} entries` },
  ]
  if ('bytesAfter' in report) list.push({ name: 'Cache', value: bytes(report.bytesAfter), note: `of ${bytes(report.bytesBefore)}` })
  if (errors !== undefined) {
    const later = errors.later === undefined ? '' : `; ${relative(errors.later)} for later ones`
    list.push({ name: 'Output error', value: relative(errors.window), note: `for the window’s queries${later}` })
  }
  const times = timesOf(report)
  if (times.length > 0) {
    const total = times.reduce((sum, [, ms]) => sum + ms, 0)
    list.push({ name: 'Time', value: duration(total), note: times.map(([what, ms]) => `${what} ${duration(ms)}`).join(', ') })
  }
  return list
}

/** Of what was measured: scores may be given, and a GPU's times are told by events. */
function timesOf(report: SelectReport | EvictReport): (readonly [string, number])[] {
  const all: [string, number][] = [
    ['scoring', report.msScore],
    ['ranking', report.msSelect],
  ]
  if ('msCompact' in report) all.push(['moving rows', report.msCompact])
  return all.filter(([, ms]) => ms > 0)
}

export function policyRows(policy: Policy): Row[] {
  const { name, score, pooling, scope, budget, floor, pyramidBeta, layerWeights, window, sinks, recent, pinned, nonFinite } = policy
  const kept =
    'ratio' in budget ? `${percent(budget.ratio)} of the entries` : 'entries' in budget ? `${grouped(budget.entries)} entries` : bytes(budget.bytes)
  const rows: Row[] = [
    ['Policy', name],
    ['Score', scoreText(score)],
    ['Pooling', pooling.kind === 'none' ? 'none' : `${pooling.kind} of ${pooling.width} neighbours`],
    ['Budget', kept],
    ['Ranked together', scopes[scope]],
    ['Window', window === 1 ? 'the last query' : `the last ${window} queries`],
    ['Protected', protectionText(sinks, recent, pinned)],
  ]
  if (floor > 0) rows.push(['Floor', `${percent(floor)} of an even share for each head`])
  if (pyramidBeta !== undefined && pyramidBeta > 0) rows.push(['Pyramid', `beta ${pyramidBeta}`])
  if (layerWeights !== undefined) rows.push(['Layer weights', layerWeights.join(', ')])
  if (nonFinite === 'keep') rows.push(['Non-finite scores', 'kept'])
  return rows
}

const scopes = { model: 'all layers and heads', layer: 'the heads of a layer', head: 'each head by itself' }
const attentions = {
  mean: 'mean attention',
  sum: 'summed attention',
  l2: 'l2 norm of attention',
  max: 'largest attention',
  last: 'attention of the last query',
}
const values = { l1: '‖v‖₁', l2: '‖v‖₂', 'projected-l1': '‖vW‖₁', 'projected-l2': '‖vW‖₂' }

function scoreText(score: ScoreRule): string {
  if (score.statistic === 'random') return `random, seed ${score.seed}`
  if (score.statistic !== 'factored') return score.statistic
  const { attention, value, aggregation, sharing } = score
  const factors = [attention === 'none' ? undefined : attentions[attention], value === 'none' ? undefined : values[value]]
  const product = factors.filter((factor) => factor !== undefined).join(' × ')
  return `${product || '1'}, ${aggregation} over the ${sharing === 'layer' ? 'heads of the layer' : 'group'}`
}

function protectionText(sinks: number, recent: number, pinned: Policy['pinned']): string {
  const ranges = [[0, sinks], ...pinned].filter(([begin, end]) => begin! < end!).map(([begin, end]) => positions(begin!, end!))
  const last = recent > 0 ? [recent === 1 ? 'the last position' : `the last ${grouped(recent)} positions`] : []
  return [...ranges, ...last].join(', ') || 'nothing'
}

export function reportRows(report: SelectReport | EvictReport, entries: number, kept: number): Row[] {
  const rows: Row[] = [
    ['Entries', grouped(entries)],
    ['Kept', `${grouped(kept)}, ${grouped(report.protectedEntries)} of them protected`],
    [
      'Exact scores',
      report.path === 'full' ? 'of every entry' : `${grouped(report.exactScores)}; bounds left ${grouped(report.candidates)} candidates`,
    ],
  ]
  if (report.fallback !== undefined) rows.push(['Not pruned', report.fallback])
  if (report.nonFinite > 0) rows.push(['Non-finite scores', grouped(report.nonFinite)])
  if ('bytesAfter' in report) rows.push(['Keys and values', `${bytes(report.bytesBefore)} before, ${bytes(report.bytesAfter)} after`])
  for (const [what, ms] of timesOf(report)) rows.push([`Time of ${what}`, duration(ms)])
  return rows
}
