import { grouped, percent, positions } from '../format.js'
import type { Payload } from '../payload.js'
import { byId, make } from './dom.js'
import type { Kept } from './kept.js'

/** Tokens on one page. */
const pageLength = 4096

/** Heads that are listed by name. */
const mostNamed = 16

/** Kept by more than this share of the heads: the next level of shading. */
const levels = [0, 0.05, 0.15, 0.35, 0.65]

/** The prompt's tokens, page by page, shaded by how many heads keep each. */
export class TextView {
  readonly #tokens: readonly string[]
  readonly #kept: Kept
  readonly #host = byId('text')
  readonly #position = byId<HTMLInputElement>('position')
  #page = -1

  constructor({ tokens = [] }: Payload, kept: Kept) {
    this.#tokens = tokens
    this.#kept = kept
    if (tokens.length === 0) return
    byId('text-section').hidden = false
    this.#host.tabIndex = 0
    byId('pick-hint').hidden = false
    byId('pages').hidden = tokens.length <= pageLength
    this.#position.max = String(tokens.length - 1)
    byId('previous').addEventListener('click', () => this.#showPage(this.#page - 1))
    byId('next').addEventListener('click', () => this.#showPage(this.#page + 1))
    this.#position.addEventListener('change', () => this.reveal(Math.floor(Number(this.#position.value))))
    this.#host.addEventListener('mouseover', ({ target }) => this.#tell(target))
    this.#showLevels()
    this.#showPage(0)
  }

  /** Goes to a position and marks its token. */
  reveal(position: number): void {
    if (!(position >= 0 && position < this.#tokens.length)) return
    this.#showPage(Math.floor(position / pageLength))
    for (const marked of this.#host.querySelectorAll('.found')) marked.classList.remove('found')
    const token = this.#host.children[position % pageLength] as HTMLElement
    token.classList.add('found')
    byId('text-section').scrollIntoView({ block: 'nearest' })
    this.#host.focus({ preventScroll: true })
    this.#host.scrollTop = token.offsetTop - this.#host.offsetTop - this.#host.clientHeight / 2
    this.#tell(token)
  }

  #showPage(page: number): void {
    if (page === this.#page) return
    this.#page = page
    const begin = page * pageLength
    const tokens = this.#tokens.slice(begin, begin + pageLength)
    const end = begin + tokens.length
    this.#host.replaceChildren(...tokens.map((token, i) => make('span', visible(token), { class: `k${this.#level(begin + i)}` })))
    this.#host.scrollTop = 0
    this.#position.value = String(begin)
    byId<HTMLButtonElement>('previous').disabled = page === 0
    byId<HTMLButtonElement>('next').disabled = end === this.#tokens.length
    byId('page-range').textContent = end - begin === this.#tokens.length ? '' : `${positions(begin, end)} of ${grouped(this.#tokens.length)}`
  }

  #level(position: number): number {
    const share = this.#kept.shareOfRows(0, position)
    return levels.filter((least) => share > least).length
  }

  #showLevels(): void {
    const names = ['none', ...levels.map((_, i) => `to ${percent(levels[i + 1] ?? 1)}`)]
    byId('levels').replaceChildren(make('span', 'Heads that keep it:'), ...names.map((name, i) => make('span', name, { class: `k${i}` })))
  }

  #positionOf(target: EventTarget | null): number | undefined {
    if (!(target instanceof HTMLElement) || target.parentElement !== this.#host) return undefined
    return this.#page * pageLength + Array.prototype.indexOf.call(this.#host.children, target)
  }

  /** Who keeps a position. */
  #keepers(position: number): string {
    const { rows, kvHeads, bin } = this.#kept
    if (bin > 1) return `on average around it, ${percent(this.#kept.shareOfRows(0, position))} of the heads keep it`
    const names: string[] = []
    for (let row = 0; row < rows; row++) {
      if (this.#kept.kept(0, row, position, position + 1) > 0) names.push(`${Math.floor(row / kvHeads)}.${row % kvHeads}`)
    }
    const some = names.length === 0 || names.length > mostNamed ? '' : ` (layer.head ${names.join(', ')})`
    return `kept by ${grouped(names.length)} of ${grouped(rows)} heads${some}`
  }

  #tell(target: EventTarget | null): void {
    const position = this.#positionOf(target)
    if (position === undefined) return
    byId('token').textContent = `Position ${grouped(position)}, “${this.#tokens[position]!.replaceAll('\n', '↵')}”: ${this.#keepers(position)}`
  }
}

/** Line ends can be seen, so that their shading can. */
function visible(token: string): string {
  return token.replaceAll('\n', '↵\n')
}
