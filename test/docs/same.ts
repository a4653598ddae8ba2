import { deepStrictEqual } from 'node:assert'

/** What a page says of a value, `expression // => value`. Typed arrays are written as lists. */
export function same(actual: unknown, expected: unknown): void {
  const list = ArrayBuffer.isView(actual) ? Array.from(actual as Int32Array) : actual
  deepStrictEqual(list, expected)
}
