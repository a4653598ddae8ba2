import { grouped, percent, positions } from '../format.js'
import type { Payload } from '../payload.js'
import { make } from './dom.js'
import type { Kept } from './kept.js'

/** Positions of one row, end excluded. */
export interface Cell {
  readonly row: number
  readonly begin: number
  readonly end: number
}

/** Texts of so many tokens can be read at once. */
const mostTokens = 40

/** What is said of the cell under the pointer. */
export class Tip {
  readonly #host: HTMLElement
  readonly #payload: Payload
  readonly #kept: Kept
  readonly #box = make('div', [], { class: 'tip', hidden: '' })

  constructor(host: HTMLElement, payload: Payload, kept: Kept) {
    this.#host = host
    this.#payload = payload
    this.#kept = kept
    host.append(this.#box)
  }

  hide(): void {
    this.#box.hidden = true
  }

  /** Beside a point of the host. */
  show(sequence: number, cell: Cell, x: number, y: number): void {
    const { kvHeads } = this.#kept
    this.#box.hidden = false
    this.#box.replaceChildren(
      make('b', `Layer ${Math.floor(cell.row / kvHeads)}, head ${cell.row % kvHeads}`),
      make('div', positions(cell.begin, cell.end)),
      make('div', this.#fate(sequence, cell)),
      ...this.#texts(sequence, cell),
    )
    const width = this.#box.offsetWidth
    const left = x + 16 + width <= this.#host.clientWidth ? x + 16 : Math.max(0, x - 16 - width)
    this.#box.style.transform = `translate(${left}px, ${y + 16}px)`
  }

  #fate(sequence: number, { row, begin, end }: Cell): string {
    const kept = this.#kept.kept(sequence, row, begin, end)
    const present = this.#kept.present(sequence, row, begin, end)
    if (present === 0) return 'no entry'
    if (end - begin === 1) return kept === 1 ? 'kept' : 'dropped'
    return `${grouped(kept)} of ${grouped(present)} kept, ${percent(kept / present)}`
  }

  /** The tokens, those that are kept marked. */
  #texts(sequence: number, { row, begin, end }: Cell): HTMLElement[] {
    const { tokens } = this.#payload
    if (tokens === undefined || end - begin > mostTokens || this.#kept.bin > 1) return []
    const words = tokens.slice(begin, end).map((token, i) => {
      const kept = this.#kept.kept(sequence, row, begin + i, begin + i + 1) === 1
      return make(kept ? 'mark' : 'span', token.replaceAll('\n', '↵'))
    })
    return [make('div', words, { class: 'quote' })]
  }
}
