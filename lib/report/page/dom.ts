/** The element of the page with an id. */
export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  const element = document.getElementById(id)
  if (element === null) throw new Error(`the page has no #${id}`)
  return element as T
}

/** A new element with a text or children; texts are never read as HTML. */
export function make<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  content: string | readonly Node[] = [],
  attributes: Readonly<Record<string, string>> = {},
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag)
  if (typeof content === 'string') element.textContent = content
  else element.append(...content)
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  return element
}

/** A table with a row of titles; the first cell of each row is its title. */
export function table(titles: readonly string[], rows: Iterable<readonly string[]>): HTMLTableElement {
  const head = make(
    'tr',
    titles.map((title) => make('th', title, { scope: 'col' })),
  )
  const body = Array.from(rows, ([first = '', ...rest]) => make('tr', [make('th', first, { scope: 'row' }), ...rest.map((cell) => make('td', cell))]))
  return make('table', [make('thead', [head]), make('tbody', body)])
}

/** Fills an element when its `<details>` is opened for the first time. */
export function fillWhenOpened(id: string, content: () => Node): void {
  const host = byId(id)
  host.closest('details')!.addEventListener('toggle', () => host.replaceChildren(content()), { once: true })
}
