import type { WriteStream } from 'node:tty'

const WIDTH = 30

/** A progress bar at the bottom of a terminal; elsewhere a plain line after each tenth of the work. */
export class Progress {
  #tenths = 0
  #begun = performance.now()

  constructor(
    private readonly total: number,
    private readonly stream: WriteStream = process.stderr,
  ) {}

  /** @param done units of the total, fractions too */
  update(done: number, what: string): void {
    const share = Math.min(1, done / this.total)
    if (this.stream.isTTY) {
      const bar = '█'.repeat(Math.round(share * WIDTH)).padEnd(WIDTH, '░')
      this.clear()
      this.stream.write(`${bar} ${Math.floor(share * 100)} %  ${what}  ${this.#remaining(share)}`)
    } else if (Math.floor(share * 10) > this.#tenths) {
      this.#tenths = Math.floor(share * 10)
      this.stream.write(`${this.#tenths * 10} %  ${what}\n`)
    }
  }

  /** Takes the bar away, so that lines can be printed in its place. */
  clear(): void {
    if (!this.stream.isTTY) return
    this.stream.clearLine(0)
    this.stream.cursorTo(0)
  }

  #remaining(share: number): string {
    const seconds = ((performance.now() - this.#begun) / 1000) * (1 / share - 1)
    return share < 0.02 ? '' : `${Math.ceil(seconds)} s left`
  }
}
