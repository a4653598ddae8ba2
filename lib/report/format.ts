import { count as grouped, percent as spaced } from '../cli/table.js'

export { grouped }

/** 0.05 -> '5 %', which no line break divides. */
export function percent(share: number): string {
  return spaced(share).replace(' ', '\u00a0')
}

/** A relative error, which may be infinite: JSON has null for that. */
export function relative(error: number | null): string {
  return error === null || error === Number.POSITIVE_INFINITY ? 'infinite' : percent(error)
}

/** 'positions 0 to 9' for those from 0 to 10, end excluded. */
export function positions(begin: number, end: number): string {
  return end - begin <= 1 ? `position ${grouped(begin)}` : `positions ${grouped(begin)} to ${grouped(end - 1)}`
}

/** Three digits at most: 0.000123 -> '1.23e-4', 0.0123 -> '0.0123' */
export function short(value: number): string {
  if (value === 0) return '0'
  const size = Math.abs(value)
  if (size >= 1e-3 && size < 1e5) return String(Number(value.toPrecision(3)))
  return value
    .toExponential(2)
    .replace(/\.?0+e/, 'e')
    .replace('e+', 'e')
}

const superscripts = '⁰¹²³⁴⁵⁶⁷⁸⁹'

/** -3 -> '10⁻³' */
export function powerOfTen(exponent: number): string {
  const digits = String(Math.abs(exponent)).replace(/\d/g, (digit) => superscripts[Number(digit)]!)
  return `10${exponent < 0 ? '⁻' : ''}${digits}`
}
