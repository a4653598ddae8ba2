import type { WriteStream } from 'node:tty'

const WIDTH = 30

/** What a bar needs of a stream such as `process.stderr`. */
export type ProgressStream = Pick<WriteStream, 'isTTY' | 'columns' | 'write' | 'clearLine' | 'cursorTo'>

/** A progress bar at the bottom of a terminal; elsewhere nothing at all, so that what is piped holds no progress. */
export class Progress {
  readonly #begun: number = performance.now()
  readonly #total: number
  readonly #stream: ProgressStream

  /** @param total units of work */
  constructor(total: number, stream: ProgressStream = process.stderr) {
    this.#total = total
    this.#stream = stream
  }

  /** @param done units of the total, fractions too */
  update(done: number, what: string): void {
    if (!this.#stream.isTTY) return
    const share = Math.min(1, done / this.#total)
    const bar = '█'.repeat(Math.round(share * WIDTH)).padEnd(WIDTH, '░')
    const line = `${bar} ${Math.floor(share * 100)} %  ${what}  ${this.#remaining(share)}`
    this.clear()
    // A line that wraps could not be taken away again.
    this.#stream.write(line.slice(0, (this.#stream.columns || 80) - 1))
  }

  /** Takes the bar away, so that lines can be printed in its place. */
  clear(): void {
    if (!this.#stream.isTTY) return
    this.#stream.clearLine(0)
    this.#stream.cursorTo(0)
  }

  #remaining(share: number): string {
    if (share < 0.02 || share === 1) return ''
    const seconds = Math.ceil(((performance.now() - this.#begun) / 1000) * (1 / share - 1))
    return seconds < 100 ? `${seconds} s left` : `${Math.ceil(seconds / 60)} min left`
  }
}
