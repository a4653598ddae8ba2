/** Rows of cells in columns: the first `left` of them to the left, the others to the right. */
export function table(rows: readonly (readonly string[])[], left = 1): string {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)))
  const align = (cell: string, column: number) => (column < left ? cell.padEnd(widths[column]!) : cell.padStart(widths[column]!))
  return rows.map((row) => row.map(align).join('   ').trimEnd()).join('\n')
}

/** 0.05 -> '5 %' */
export function percent(share: number): string {
  return `${Number((share * 100).toPrecision(3))} %`
}

/** 1257472 -> '1.26 MB' */
export function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toPrecision(3)} MB`
}

/** 1234.5 -> '1.23 s', 12.34 -> '12.3 ms' */
export function duration(ms: number): string {
  return ms >= 1000 ? `${(ms / 1000).toPrecision(3)} s` : `${ms.toPrecision(3)} ms`
}

/** 0.1 -> '+0.100' */
export function signed(nats: number): string {
  return `${nats < 0 ? '-' : '+'}${Math.abs(nats).toFixed(3)}`
}
