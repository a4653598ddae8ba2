/** A seeded generator (mulberry32): the same seed gives the same test on every machine. */
export class Random {
  #state: number

  constructor(seed: number) {
    this.#state = seed >>> 0
  }

  /** Uniform in [0, 1). */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0
    let x = this.#state
    x = Math.imul(x ^ (x >>> 15), x | 1)
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61)
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32
  }

  /** An integer from low to high, both included. */
  integer(low: number, high: number): number {
    return low + Math.floor(this.next() * (high - low + 1))
  }

  pick<T>(choices: readonly T[]): T {
    return choices[this.integer(0, choices.length - 1)] as T
  }

  chance(probability: number): boolean {
    return this.next() < probability
  }

  /** Standard normal. */
  normal(): number {
    return Math.sqrt(-2 * Math.log(1 - this.next())) * Math.cos(2 * Math.PI * this.next())
  }

  /** A copy in random order. */
  shuffled<T>(items: Iterable<T>): T[] {
    const copy = [...items]
    for (let i = copy.length - 1; i > 0; i--) {
      const j = this.integer(0, i)
      const swapped = copy[i] as T
      copy[i] = copy[j] as T
      copy[j] = swapped
    }
    return copy
  }

  /** `count` different integers from 0 to `below` - 1, ascending. */
  subset(below: number, count: number): number[] {
    return this.shuffled(Array(below).keys())
      .slice(0, count)
      .sort((a, b) => a - b)
  }
}
