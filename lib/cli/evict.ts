import { basename, resolve } from 'node:path'
import { Command, Option } from 'commander'
import { type EvictReport, evict } from '../evict.js'
import type { Fidelity } from '../fidelity.js'
import { checkReplaceable } from '../file.js'
import { type Policy, type PresetName, policy as preset, type Scope } from '../policy.js'
import { type ReportSummary, writeReport } from '../report/report.js'
import { score } from '../score.js'
import type { Selection } from '../selection.js'
import { writeKept } from './kept.js'
import { readCount, readPolicyName, readShare } from './options.js'
import { packageVersion } from './package.js'
import { captureHelp, type DeviceOptions, describeDevice, deviceFacts, deviceOptions, Session } from './session.js'
import { bytes, count, duration, percent, table } from './table.js'
import { printJson, type Terminal, watch } from './terminal.js'

interface Options extends DeviceOptions {
  readonly keep: number
  readonly policy: PresetName
  readonly window?: number
  readonly out?: string
  readonly report?: string
}

export function evictCommand(terminal: Terminal): Command {
  const command = new Command('evict')
    .description('evicts from a captured cache: writes what a policy keeps of it, and a report')
    .argument('<capture>', 'a file with a captured cache: see below')
    .addOption(new Option('--keep <share>', 'how much of the cache to keep, as 5% or 0.05').argParser(readShare).default(0.05, '5%'))
    .option('--policy <name>', 'what decides', readPolicyName, 'laprox')
    .option('--window <rows>', 'last queries that the policy looks at, up to 128 (default: its own)', readCount)
    .option('--out <file>', 'write the kept rows there, as safetensors')
    .option('--report <file>', 'write an HTML page there that shows what was kept')
  return deviceOptions(command)
    .addHelpText('after', captureHelp)
    .addHelpText('after', '\nExample:\n  laprox evict prompt.safetensors --keep 5% --policy laprox --out kept.safetensors --report report.html')
    .action(async (file: string, options: Options) => {
      checkOutputs(command, file, options)
      await evictCapture(file, options, terminal)
    })
}

/** Outputs that would overwrite each other or the capture. */
function checkOutputs(command: Command, file: string, { out, report }: Options): void {
  const names: [string, string | undefined][] = [
    ['the capture', file],
    ['--out', out],
    ['--report', report],
  ]
  const seen = new Map<string, string>()
  for (const [name, path] of names) {
    if (path === undefined) continue
    const same = seen.get(resolve(path))
    if (same !== undefined) command.error(`error: ${name} ${path} is the file of ${same}, too`)
    seen.set(resolve(path), name)
  }
}

async function evictCapture(file: string, options: Options, terminal: Terminal): Promise<void> {
  const { keep, window, out, report: page } = options
  const policy = preset(options.policy, { keep, window })
  for (const path of [out, page]) if (path !== undefined) await checkReplaceable(path)

  using session = await Session.open(file, options, terminal)
  const { capture, device } = session
  const begun = performance.now()
  const evicted = await watch(terminal, 'evicting', (hooks) => evict(capture.model, capture.cache, capture.window, policy, hooks))
  const ms = performance.now() - begun
  using kept = evicted.cache
  using selection = evicted.selection
  const { report } = evicted
  if (out !== undefined) {
    const from = { capture: basename(file), model: capture.name, policy, contextLength: capture.cache.lengths(0)[0]! }
    await writeKept(out, kept, from, { signal: terminal.signal })
  }

  const errors = await session.fidelity(selection, terminal)
  const summary = page === undefined ? undefined : await writePage(page, session, { policy, selection, report, errors }, terminal)

  if (options.json) {
    const facts = { capture: session.facts(), device: deviceFacts(device), policy, report, fidelity: errors, ms }
    printJson(terminal, { ...facts, ...(out === undefined ? {} : { out }), ...(summary === undefined ? {} : { page: { file: page, ...summary } }) })
    return
  }
  const rows = [...session.rows(), ...reportRows(policy, report, ms), ['output error', session.describeErrors(errors)]]
  if (summary !== undefined) rows.push(['report', `${page}, ${bytes(summary.bytes)}`], ...summary.thinned.map((sentence) => ['', sentence]))
  terminal.stdout.write(`${table(rows, Number.POSITIVE_INFINITY)}\n`)
}

/** What an eviction came to. */
interface Outcome {
  readonly policy: Policy
  readonly selection: Selection
  readonly report: EvictReport
  readonly errors: Fidelity
}

/** Writes the HTML page, with every score: their distribution is in it. */
async function writePage(file: string, session: Session, { policy, selection, report, errors }: Outcome, terminal: Terminal): Promise<ReportSummary> {
  const { model, cache, window, name, tokens } = session.capture
  const { signal } = terminal
  using there = await watch(terminal, 'every score', (hooks) => score(model, cache, window, policy, hooks))
  return writeReport(file, {
    title: `What ${policy.name} keeps of ${name ?? basename(session.file)}`,
    policy,
    selection: await selection.to('cpu', { signal }),
    report,
    scores: await there.to('cpu', { signal }),
    fidelity: errors,
    tokens,
    facts: { Capture: session.file, ...(name === undefined ? {} : { Model: name }), Device: describeDevice(session.device), laprox: packageVersion },
  })
}

const scopes: Readonly<Record<Scope, string>> = { model: 'one budget for the model', layer: 'a budget a layer', head: 'a budget a head' }

function reportRows(policy: Policy, report: EvictReport, ms: number): string[][] {
  const { entries, kept, protectedEntries, bytesBefore, bytesAfter, path, candidates, exactScores, fallback } = report
  const scoring =
    path === 'pruned'
      ? `${count(candidates)} (${percent(candidates / entries)}), ${count(exactScores)} exact scores`
      : `all${fallback === undefined ? '' : `: ${fallback}`}`
  const stages =
    report.msScore > 0 ? ` (score ${duration(report.msScore)}, select ${duration(report.msSelect)}, compact ${duration(report.msCompact)})` : ''
  return [
    ['policy', `${policy.name}, ${scopes[policy.scope]}, window ${policy.window}`],
    ['entries', `${count(entries)}, kept ${count(kept)} (${percent(kept / entries)}), of these ${count(protectedEntries)} protected`],
    ['bytes', `${bytes(bytesBefore)}, kept ${bytes(bytesAfter)}`],
    ['candidates', scoring],
    ['time', `${duration(ms)}${stages}`],
  ]
}
