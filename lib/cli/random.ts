/** A seeded source of numbers: the same on every machine. */
export class Random {
  #state: number

  constructor(seed: number) {
    this.#state = seed >>> 0
  }

  /** 32 uniform bits (mulberry32). */
  bits(): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0
    let bits = Math.imul(this.#state ^ (this.#state >>> 15), this.#state | 1)
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61)
    return (bits ^ (bits >>> 14)) >>> 0
  }

  /** In (0, 1). */
  uniform(): number {
    return (this.bits() + 0.5) / 2 ** 32
  }

  /** Standard normal. */
  normal(): number {
    return Math.sqrt(-2 * Math.log(this.uniform())) * Math.cos(2 * Math.PI * this.uniform())
  }

  /** Nearly normal with mean 0 and variance 1, bounded by 3.5, and fast: the sum of four bytes. */
  noise(): number {
    const bits = this.bits()
    return ((bits & 255) + ((bits >>> 8) & 255) + ((bits >>> 16) & 255) + (bits >>> 24) - 510) / 147.8
  }
}
