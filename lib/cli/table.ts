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

/** 1257472 -> '1,257,472' */
export function count(number: number): string {
  return number.toLocaleString('en-US')
}

/** 1257472 -> '1.26 MB' */
export function bytes(count: number): string {
  const power = Math.min(4, Math.max(1, Math.floor(Math.log10(count) / 3)))
  return count < 1000 ? `${count} B` : `${digits(count / 1000 ** power)} ${['', 'k', 'M', 'G', 'T'][power]}B`
}

/** 1234.5 -> '1.23 s', 12.34 -> '12.3 ms' */
export function duration(ms: number): string {
  return ms >= 1000 ? `${digits(ms / 1000)} s` : `${digits(ms)} ms`
}

/** 0.1 -> '+0.100' */
export function signed(nats: number): string {
  return `${nats < 0 ? '-' : '+'}${Math.abs(nats).toFixed(3)}`
}

/** Three digits, or all of those before the point. */
function digits(value: number): string {
  return value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)
}
