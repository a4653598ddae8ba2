import { type AttentionModel, fidelity, score, writeReport } from 'laprox'
import { percent } from '#lib/cli/table'
import type { Comparison } from './comparison.js'
import type { Text } from './text.js'

/** Writes a page that shows what the first policy keeps of a prompt. */
export async function writePage(file: string, model: AttentionModel, comparison: Comparison, text: Text): Promise<void> {
  const { task, prompt, index, cache, window, trials } = comparison
  const { policy, keep, selection, report } = trials[0]!
  const { name, threads, instructionSet } = model.device.info()
  await writeReport(file, {
    title: `${policy.name} keeps ${percent(keep)} of ${task.name} ${index + 1}`,
    policy,
    selection,
    report,
    scores: await score(model, cache, window, policy),
    fidelity: await fidelity(model, cache, selection, window),
    tokens: text.each(prompt.ids),
    facts: { Device: `${name}, ${threads} threads, ${instructionSet}` },
  })
}
