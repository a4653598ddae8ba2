import { bytes, duration, percent, signed, table } from '#lib/cli/table'
import type { Prompt } from '#lib/evaluation/tasks'
import type { Comparison } from './comparison.js'
import type { Text } from './text.js'
import type { Verdict } from './verdict.js'

/** One prompt as the demo shows it: what was asked, where the text says it, and what came of each cache. */
export function showComparison({ task, prompt, index, msPrefill, full, trials }: Comparison, text: Text): string {
  const byLoss = task.judgedBy === 'loss'
  const outcome = (verdict: Verdict) =>
    byLoss
      ? `loss ${verdict.figure.toFixed(3)}${verdict === full ? '' : ` (${signed(verdict.figure - full.figure)})`}`
      : `${text.line(verdict.answer)} ${verdict.figure ? '✓' : '✗'}`
  const answers = table(
    [
      ['  full cache', outcome(full), bytes(trials[0]!.report.bytesBefore), '', '', '', `answer ${duration(full.ms)}`],
      ...trials.map(({ policy, keep, verdict, report }) => [
        `  ${policy.name} ${percent(keep)}`,
        outcome(verdict),
        bytes(report.bytesAfter),
        `score ${duration(report.msScore)}`,
        `select ${duration(report.msSelect)}`,
        `compact ${duration(report.msCompact)}`,
        `answer ${duration(verdict.ms)}`,
      ]),
    ],
    Number.POSITIVE_INFINITY,
  )
  const context = byLoss ? continuation(prompt, text) : question(prompt, text)
  return [`${task.name} ${index + 1}: ${prompt.ids.length} tokens, read in ${duration(msPrefill)}`, ...context, answers].join('\n')
}

function question({ ids, answer }: Prompt, text: Text): string[] {
  const { question, passages } = text.questionAndEvidence(ids)
  return [...passages.map((passage) => `  the text      ${passage}`), `  question      ${question}`, `  right answer  ${text.line(answer)}`]
}

function continuation({ ids, answer }: Prompt, text: Text): string[] {
  return [`  prompt ends   …${text.line(ids.subarray(-40))}`, `  goes on       ${text.line(answer)}`]
}
