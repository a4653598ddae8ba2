import { Command, Option } from 'commander'
import { evict } from '../evict.js'
import type { Fidelity } from '../fidelity.js'
import { type Policy, type PresetName, policy as preset } from '../policy.js'
import type { Selection, SelectReport } from '../selection.js'
import { readCount, readList, readPolicyName, readShare } from './options.js'
import { type CaptureFacts, captureHelp, type DeviceOptions, deviceFacts, deviceOptions, Session } from './session.js'
import { count, duration, percent, table } from './table.js'
import { printJson, type Terminal, watch } from './terminal.js'

interface Options extends DeviceOptions {
  readonly keep: readonly number[]
  readonly policy: readonly PresetName[]
  readonly window?: number
}

/** What a policy made of the capture. */
interface Result {
  readonly policy: Policy
  readonly keep: number
  readonly report: SelectReport
  /** Of an eviction, the second of two: the first pays for memory. */
  readonly ms: number
  readonly selection: Selection
  readonly fidelity: Fidelity
}

export function compareCommand(terminal: Terminal): Command {
  const command = new Command('compare')
    .description('compares policies on a captured cache: what they keep, what that does to the output, how long they take')
    .argument('<capture>', 'a file with a captured cache: see below')
    .addOption(new Option('--keep <shares>', 'how much of the cache to keep, as 5%,10%').argParser(readList(readShare)).default([0.05], '5%'))
    .addOption(
      new Option('--policy <names>', 'what to compare, separated by commas')
        .argParser(readList(readPolicyName))
        .default(['laprox', 'snapkv', 'adakv'], 'laprox,snapkv,adakv'),
    )
    .option('--window <rows>', 'last queries that the policies look at, up to 128 (default: their own)', readCount)
  return deviceOptions(command)
    .addHelpText('after', captureHelp)
    .addHelpText('after', '\nExample:\n  laprox compare prompt.safetensors --policy laprox,snapkv,adakv --keep 5%,10%')
    .action((file: string, options: Options) => comparePolicies(file, options, terminal))
}

async function comparePolicies(file: string, options: Options, terminal: Terminal): Promise<void> {
  const { window } = options
  const contenders = options.keep.flatMap((keep) => options.policy.map((name) => ({ keep, policy: preset(name, { keep, window }) })))
  using session = await Session.open(file, options, terminal)
  const results: Result[] = []
  for (const { keep, policy } of contenders) results.push({ keep, policy, ...(await run(session, policy, terminal)) })
  const overlaps = options.keep.map((keep) => ({ keep, matrix: overlap(results.filter((result) => result.keep === keep)) }))
  if (options.json) {
    printJson(terminal, {
      capture: session.facts(),
      device: deviceFacts(session.device),
      results: results.map(({ selection: _, ...result }) => result),
      overlaps: overlaps.map(({ keep, matrix }) => ({ keep, policies: options.policy, shares: matrix })),
    })
    return
  }
  const blocks = [table(session.rows(), Number.POSITIVE_INFINITY), resultTable(results, session.facts())]
  if (options.policy.length > 1) blocks.push(...overlaps.map(({ keep, matrix }) => overlapTable(keep, options.policy, matrix)))
  terminal.stdout.write(`${blocks.join('\n\n')}\n`)
}

async function run(session: Session, policy: Policy, terminal: Terminal): Promise<Omit<Result, 'policy' | 'keep'>> {
  const { model, cache, window } = session.capture
  const once = async (): Promise<Pick<Result, 'ms' | 'report' | 'selection'>> => {
    const begun = performance.now()
    const evicted = await watch(terminal, policy.name, (hooks) => evict(model, cache, window, policy, hooks))
    const ms = performance.now() - begun
    evicted.cache.dispose()
    return { ms, report: evicted.report, selection: evicted.selection }
  }
  const first = await once()
  first.selection.dispose()
  const second = await once()
  using there = second.selection
  const selection = await there.to('cpu', { signal: terminal.signal })
  return { ...second, selection, fidelity: await session.fidelity(selection, terminal) }
}

/** Of what each keeps, the share that each of the others keeps, too. */
function overlap(results: readonly Result[]): number[][] {
  return results.map(({ selection }) => results.map((other) => shared(selection, other.selection) / Math.max(1, selection.entries)))
}

/** Entries that both keep. */
function shared(a: Selection, b: Selection): number {
  let both = 0
  for (let layer = 0; layer < a.layers; layer++) {
    for (let head = 0; head < a.kvHeads; head++) {
      const [as, bs] = [a.kept(layer, 0, head), b.kept(layer, 0, head)]
      for (let i = 0, j = 0; i < as.length && j < bs.length; ) {
        const difference = as[i]! - bs[j]!
        if (difference === 0) both++
        if (difference <= 0) i++
        if (difference >= 0) j++
      }
    }
  }
  return both
}

function resultTable(results: readonly Result[], { queries, laterQueries }: CaptureFacts): string {
  const rows = table([
    ['', 'kept', 'error', ...(laterQueries === 0 ? [] : ['later error']), 'candidates', 'time', 'score', 'select'],
    ...results.map(({ policy, keep, report, fidelity, ms }) => [
      `${policy.name} ${percent(keep)}`,
      count(report.kept),
      percent(fidelity.window),
      ...(fidelity.later === undefined ? [] : [percent(fidelity.later)]),
      report.path === 'pruned' ? percent(report.candidates / report.entries) : 'all',
      duration(ms),
      ...(report.msScore > 0 ? [duration(report.msScore), duration(report.msSelect)] : ['', '']),
    ]),
  ])
  const later = laterQueries === 0 ? '' : `, and over ${laterQueries} later ones`
  return `${rows}\nError: of the layers' outputs, relative to the full cache's, over the last ${queries} queries${later}.`
}

function overlapTable(keep: number, names: readonly string[], matrix: readonly (readonly number[])[]): string {
  const rows = names.map((name, i) => [name, ...matrix[i]!.map(percent)])
  return `Of the ${percent(keep)} that each row keeps, the share that the column keeps, too:\n${table([['', ...names], ...rows])}`
}
