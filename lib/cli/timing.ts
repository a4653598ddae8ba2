/** How long something took: milliseconds of one run, over so many of them. */
export interface Timing {
  readonly msMedian: number
  readonly msP10: number
  readonly msP90: number
  readonly samples: number
}

/** Quantiles of milliseconds, interpolated. */
export function timing(samples: readonly number[]): Timing {
  const sorted = Float64Array.from(samples).sort()
  const quantile = (q: number): number => {
    const at = q * (sorted.length - 1)
    const [below, above] = [sorted[Math.floor(at)]!, sorted[Math.ceil(at)]!]
    return below + (at - Math.floor(at)) * (above - below)
  }
  return { msMedian: quantile(0.5), msP10: quantile(0.1), msP90: quantile(0.9), samples: sorted.length }
}
