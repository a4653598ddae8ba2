import { rampOf } from './ramp.js'

/** What charts are drawn with, from the variables of page.css. */
export interface Theme {
  readonly ink: string
  readonly muted: string
  readonly line: string
  readonly paper: string
  readonly kept: string
  readonly dropped: string
  readonly later: string
  readonly threshold: string
  readonly font: string
  /** 256 colours from nothing to everything, bytes in the order of ImageData. */
  readonly ramp: Uint32Array
}

const listeners = new Set<(theme: Theme) => void>()
const dark = matchMedia('(prefers-color-scheme: dark)')
let chosen: 'light' | 'dark' | undefined

/** The theme now, and again whenever it changes. */
export function withTheme(use: (theme: Theme) => void): void {
  listeners.add(use)
  use(readTheme())
}

/** Follows the system until the button is pressed; paper is always light. */
export function startTheme(button: HTMLButtonElement): void {
  const apply = (name: 'light' | 'dark') => {
    document.documentElement.dataset.theme = name
    button.textContent = name === 'dark' ? 'Light theme' : 'Dark theme'
    const theme = readTheme()
    for (const use of listeners) use(theme)
  }
  const current = () => chosen ?? (dark.matches ? 'dark' : 'light')
  button.addEventListener('click', () => {
    chosen = current() === 'dark' ? 'light' : 'dark'
    apply(chosen)
  })
  dark.addEventListener('change', () => apply(current()))
  addEventListener('beforeprint', () => apply('light'))
  addEventListener('afterprint', () => apply(current()))
  apply(current())
}

function readTheme(): Theme {
  const style = getComputedStyle(document.documentElement)
  const read = (name: string) => style.getPropertyValue(`--${name}`).trim()
  return {
    ink: read('ink'),
    muted: read('muted'),
    line: read('line'),
    paper: read('paper'),
    kept: read('kept'),
    dropped: read('dropped'),
    later: read('later'),
    threshold: read('threshold'),
    font: getComputedStyle(document.body).fontFamily,
    ramp: rampOf(read('ramp').split(/\s+/)),
  }
}
