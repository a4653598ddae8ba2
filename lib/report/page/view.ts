/** A rectangle of the heat map: positions and rows of one sequence, ends excluded. */
export interface View {
  readonly from: number
  readonly to: number
  readonly top: number
  readonly bottom: number
}

/** How far a view can go: all of it, and the least of it. */
export interface Limits {
  readonly positions: number
  readonly rows: number
  readonly leastPositions: number
}

export type Move = 'in' | 'out' | 'left' | 'right' | 'up' | 'down' | 'rows-in' | 'rows-out' | 'begin' | 'end' | 'all'

const keys: Readonly<Record<string, Move>> = {
  ArrowLeft: 'left',
  ArrowRight: 'right',
  ArrowUp: 'up',
  ArrowDown: 'down',
  Home: 'begin',
  End: 'end',
  '+': 'in',
  '=': 'in',
  '-': 'out',
  '0': 'all',
}
/** A plus needs the shift key on many keyboards. */
const shiftedKeys: Readonly<Record<string, Move>> = { ...keys, ArrowUp: 'rows-in', ArrowDown: 'rows-out' }

/** What is needed of a KeyboardEvent. */
interface Keystroke {
  readonly key: string
  readonly shiftKey: boolean
  readonly ctrlKey: boolean
  readonly metaKey: boolean
  readonly altKey: boolean
}

/** What a key asks for; with other modifiers it is the browser's. */
export function moveOf({ key, shiftKey, ctrlKey, metaKey, altKey }: Keystroke): Move | undefined {
  return ctrlKey || metaKey || altKey ? undefined : (shiftKey ? shiftedKeys : keys)[key]
}

/** A view after a move: by quarters of what is visible, to the half or the double of it. */
export function moved(view: View, move: Move, limits: Limits): View {
  const { from, to, top, bottom } = view
  const { positions, rows } = limits
  switch (move) {
    case 'in':
    case 'out':
      return zoomed(view, 'positions', move === 'in' ? 0.5 : 2, 0.5, limits)
    case 'rows-in':
    case 'rows-out':
      return zoomed(view, 'rows', move === 'rows-in' ? 0.5 : 2, 0.5, limits)
    case 'left':
    case 'right':
      return across(view, shifted(from, to, ((move === 'left' ? -1 : 1) * (to - from)) / 4, positions))
    case 'begin':
    case 'end':
      return across(view, shifted(from, to, move === 'begin' ? -positions : positions, positions))
    case 'up':
    case 'down':
      return down(view, shifted(top, bottom, ((move === 'up' ? -1 : 1) * (bottom - top)) / 4, rows))
    case 'all':
      return { from: 0, to: positions, top: 0, bottom: rows }
  }
}

/** A view that shows `factor` times as much, about a point of it from 0 to 1. */
export function zoomed(view: View, axis: 'positions' | 'rows', factor: number, about: number, { positions, rows, leastPositions }: Limits): View {
  const { from, to, top, bottom } = view
  return axis === 'positions'
    ? across(view, scaled(from, to, factor, about, leastPositions, positions))
    : down(view, scaled(top, bottom, factor, about, 1, rows))
}

type Range = readonly [begin: number, end: number]

const across = (view: View, [from, to]: Range): View => ({ ...view, from, to })
const down = (view: View, [top, bottom]: Range): View => ({ ...view, top, bottom })

function scaled(begin: number, end: number, factor: number, about: number, least: number, whole: number): Range {
  const length = Math.min(whole, Math.max(least, (end - begin) * factor))
  const first = begin + about * (end - begin - length)
  return shifted(first, first + length, 0, whole)
}

/** As far as [0, whole] allows. */
function shifted(begin: number, end: number, by: number, whole: number): Range {
  const length = end - begin
  const first = Math.max(0, Math.min(whole - length, begin + by))
  return [first, first + length]
}
