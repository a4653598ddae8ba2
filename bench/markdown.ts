/** A table. */
export function rows(head: readonly string[], body: readonly (readonly string[])[]): string {
  const escaped = body.map((cells) => cells.map((cell) => cell.replaceAll('|', '\\|')))
  return [head, head.map(() => '---'), ...escaped].map((cells) => `| ${cells.join(' | ')} |`).join('\n')
}

/** Three digits, or all of a whole number. */
export function round(value: number): string {
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(3)))
}

/** Two digits, or all of those before the point: 0.50, 6.0, 267. */
export function roughly(value: number): string {
  return value < 100 ? value.toPrecision(2) : value.toFixed(0)
}
