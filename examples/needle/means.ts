import { mean } from '#lib/evaluation/estimate'

/** Means of named figures, each over the samples that have it. */
export class Means<Name extends string = string> {
  readonly #samples = new Map<Name, number[]>()

  add(sample: Readonly<Record<Name, number>>): void {
    for (const [name, value] of Object.entries(sample) as [Name, number][]) {
      const values = this.#samples.get(name)
      if (values === undefined) this.#samples.set(name, [value])
      else values.push(value)
    }
  }

  values(): Record<Name, number> {
    return Object.fromEntries([...this.#samples].map(([name, values]) => [name, mean(values)])) as Record<Name, number>
  }
}
