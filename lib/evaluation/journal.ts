import { appendFileSync, existsSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { LaproxError } from '../errors.js'

/**
 * What an evaluation has measured so far, a line of JSON each: a line is in the file when {@link Journal.add} returns, so that a run
 * that was stopped, however, can go on. The first line says what was measured; a last line that is cut off is dropped.
 */
export class Journal<Entry> {
  readonly file: string
  /** In the order in which they were added. */
  readonly entries: readonly Entry[]

  private constructor(file: string, entries: readonly Entry[]) {
    this.file = file
    this.entries = entries
  }

  /**
   * Opens the journal of a run, or begins one.
   *
   * @param subject what is measured: plain data
   * @throws LaproxError `INVALID_ARGUMENT` where the file is of another subject, naming what differs, `BAD_FILE`, `IO`
   */
  static open<Entry>(file: string, subject: Readonly<Record<string, unknown>>): Journal<Entry> {
    return onDisk(file, () => {
      const text = existsSync(file) ? readFileSync(file, 'utf8') : ''
      const whole = text.slice(0, text.lastIndexOf('\n') + 1)
      if (whole === '') {
        writeFileSync(file, `${JSON.stringify(subject)}\n`)
        return new Journal<Entry>(file, [])
      }
      const [first, ...entries] = whole
        .trimEnd()
        .split('\n')
        .map((line, i) => parse(line, file, i + 1))
      checkSubject(file, first, JSON.parse(JSON.stringify(subject)))
      if (whole.length < text.length) truncateSync(file, Buffer.byteLength(whole))
      return new Journal(file, entries as Entry[])
    })
  }

  /** @throws LaproxError `IO` */
  add(entry: Entry): void {
    onDisk(this.file, () => appendFileSync(this.file, `${JSON.stringify(entry)}\n`, { flush: true }))
  }
}

function parse(line: string, file: string, number: number): unknown {
  try {
    return JSON.parse(line)
  } catch (cause) {
    throw new LaproxError('BAD_FILE', `${file}: line ${number} is no JSON; remove the file to begin anew`, { cause })
  }
}

function checkSubject(file: string, found: unknown, wanted: Readonly<Record<string, unknown>>): void {
  const subject = (typeof found === 'object' && found !== null ? found : {}) as Readonly<Record<string, unknown>>
  const differing = Object.keys({ ...subject, ...wanted }).filter((key) => JSON.stringify(subject[key]) !== JSON.stringify(wanted[key]))
  if (differing.length === 0) return
  const what = differing
    .map((key) => {
      const [was, is] = [JSON.stringify(subject[key]) ?? 'missing', JSON.stringify(wanted[key]) ?? 'missing']
      return was.length + is.length < 100 ? `${key} was ${was} and is ${is}` : key
    })
    .join(', ')
  throw new LaproxError(
    'INVALID_ARGUMENT',
    `${file} is the journal of another run, which cannot go on here (${what}); remove it or name another file`,
  )
}

function onDisk<T>(file: string, work: () => T): T {
  try {
    return work()
  } catch (error) {
    if (error instanceof LaproxError) throw error
    throw new LaproxError('IO', `${file}: ${(error as Error).message}`, { cause: error })
  }
}
