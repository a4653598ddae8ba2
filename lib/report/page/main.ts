import { grouped, percent, positions } from '../format.js'
import { type Payload, unpack } from '../payload.js'
import { byId, make, table } from './dom.js'
import { showFidelity } from './fidelity.js'
import { HeatMap } from './heat-map.js'
import { showScores } from './histogram.js'
import { Kept } from './kept.js'
import { showRamp } from './ramp.js'
import { ShareChart } from './shares.js'
import { TextView } from './text.js'
import { startTheme, withTheme } from './theme.js'
import type { Move, View } from './view.js'

async function readData(): Promise<ArrayBuffer> {
  const binary = atob(byId('data').textContent)
  const bytes = Uint8Array.from(binary, (character) => character.charCodeAt(0))
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).arrayBuffer()
}

function showFigures({ policy, figures, thinned, tables }: Payload): void {
  byId('policy').textContent = policy
  byId('figures').replaceChildren(
    ...figures.map(({ name, value, note }) =>
      make('div', [make('dt', name), make('dd', value, { class: 'value' }), make('dd', note, { class: 'note' })]),
    ),
  )
  byId('thinned').hidden = thinned.length === 0
  byId('thinned').replaceChildren(...thinned.map((sentence) => make('li', sentence)))
  byId('tables').replaceChildren(...tables.map(({ name, rows }) => make('div', [make('h3', name), table(['', ''], rows)])))
}

async function run(): Promise<void> {
  const packed = unpack(await readData())
  const { payload } = packed
  const kept = new Kept(packed)
  showFigures(payload)
  withTheme(({ ramp }) => showRamp(byId('ramp'), ramp))

  let sequence = 0
  let timer: ReturnType<typeof setTimeout>
  // Screen readers are told of the view where it comes to rest.
  const tell = (view: View) => {
    clearTimeout(timer)
    timer = setTimeout(() => {
      byId('range').textContent = describe(view, payload, kept, sequence)
    }, 150)
  }
  const text = new TextView(payload, kept)
  const map = new HeatMap(byId('heat-map'), payload, kept, tell, (position) => text.reveal(position))
  for (const button of document.querySelectorAll<HTMLButtonElement>('[data-move]'))
    button.addEventListener('click', () => map.move(button.dataset.move as Move))
  const shares = new ShareChart(payload)
  showScores(payload)
  showFidelity(payload)

  if (payload.sequences > 1) {
    byId('sequence-choice').hidden = false
    const choice = byId<HTMLSelectElement>('sequence')
    choice.replaceChildren(...payload.contexts.map((_, i) => make('option', String(i), { value: String(i) })))
    choice.addEventListener('change', () => {
      sequence = Number(choice.value)
      map.sequence = sequence
      shares.sequence = sequence
    })
  }
}

function describe(view: View, { layers, kvHeads, contexts }: Payload, kept: Kept, sequence: number): string {
  const inside = kept.within(sequence, view)
  const [first, last] = [inside.firstRow, inside.lastRow].map((row) => Math.floor(row / kvHeads)) as [number, number]
  const rows = first === last ? `layer ${first}` : last - first === layers - 1 ? `all ${grouped(layers)} layers` : `layers ${first} to ${last}`
  const columns = positions(inside.begin, Math.min(contexts[sequence]!, inside.end))
  return `Shown: ${columns}, ${rows}; ${percent(inside.kept / (inside.present || 1))} kept`
}

startTheme(byId<HTMLButtonElement>('theme'))
run().catch((error: unknown) => {
  byId('failure').hidden = false
  byId('failure').textContent = `This report cannot be shown here: ${error instanceof Error ? error.message : error}`
  throw error
})
