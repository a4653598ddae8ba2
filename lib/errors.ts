/**
 * What went wrong, as a stable string. The first eleven are the statuses of the C ABI without their `LPX_` (its
 * `LPX_CANCELLED` is `ABORTED` here); the others come from the TypeScript layer.
 *
 * | code | meaning |
 * |---|---|
 * | `INVALID_ARGUMENT` | a value, shape, dtype or option that cannot be |
 * | `OUT_OF_BOUNDS` | strides, indices, page ids or lengths that leave their buffer |
 * | `OVERLAP` | outputs that overlap each other or an input |
 * | `BUDGET_TOO_SMALL` | the budget is below what is protected |
 * | `NON_FINITE` | NaN or infinity among scores or projections |
 * | `OUT_OF_MEMORY` | the host or the device has no memory left |
 * | `OUT_OF_PAGES` | the free list is shorter than the pages needed |
 * | `UNSUPPORTED` | this backend, or this version, does not do that |
 * | `NO_DEVICE` | the backend that was asked for is not available |
 * | `DEVICE_ERROR` | the device failed |
 * | `INTERNAL` | a defect of laprox: please report it |
 * | `ABORTED` | the call's `AbortSignal` was aborted; `cause` is the signal's reason |
 * | `DISPOSED` | an object was used after its `dispose()` |
 * | `DETACHED` | a typed array lost its buffer (it was transferred) before or during the call |
 * | `DEVICE_MISMATCH` | objects of different devices in one call |
 * | `BAD_FILE` | a file that is damaged, lies about itself or is of another kind |
 * | `IO` | the file system failed; `cause` is its error |
 * | `NATIVE_MISSING` | the native library was not found; the message says what to do |
 * | `NATIVE_VERSION` | the native library is of another version |
 */
export type LaproxErrorCode =
  | 'INVALID_ARGUMENT'
  | 'OUT_OF_BOUNDS'
  | 'OVERLAP'
  | 'BUDGET_TOO_SMALL'
  | 'NON_FINITE'
  | 'OUT_OF_MEMORY'
  | 'OUT_OF_PAGES'
  | 'UNSUPPORTED'
  | 'NO_DEVICE'
  | 'DEVICE_ERROR'
  | 'INTERNAL'
  | 'ABORTED'
  | 'DISPOSED'
  | 'DETACHED'
  | 'DEVICE_MISMATCH'
  | 'BAD_FILE'
  | 'IO'
  | 'NATIVE_MISSING'
  | 'NATIVE_VERSION'

/**
 * The one class of error that laprox throws and rejects with. Branch on {@link LaproxError.code}; the message is for
 * people: it names the argument, what it was and what was expected, and may change between releases.
 */
export class LaproxError extends Error {
  /** What went wrong, stable between releases. */
  readonly code: LaproxErrorCode

  constructor(code: LaproxErrorCode, message: string, options?: ErrorOptions) {
    super(message, options)
    this.code = code
  }

  static {
    // On the prototype, so that stack traces begin with the class's name and the name is no property of each error.
    Object.defineProperty(LaproxError.prototype, 'name', { value: 'LaproxError', configurable: true, writable: true })
  }
}

/** Throws `ABORTED`, with the signal's reason as `cause`, if `signal` is aborted. */
export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw new LaproxError('ABORTED', 'the call was aborted by its signal', { cause: signal.reason })
}

/** A value as error messages show it: on one line, short, and without ever throwing. */
export function show(value: unknown): string {
  return shown(value, 0)
}

function shown(value: unknown, depth: number): string {
  switch (typeof value) {
    case 'string':
      return quote(value.length > 80 ? `${value.slice(0, 77)}...` : value)
    case 'bigint':
      return `${value}n`
    case 'function':
      return 'a function'
    case 'object':
      break
    default:
      return String(value)
  }
  if (value === null) return 'null'
  try {
    if (ArrayBuffer.isView(value)) return `${typeName(value)}(${(value as Uint8Array).length ?? value.byteLength})`
    if (Array.isArray(value)) {
      if (depth > 1) return '[...]'
      const more = value.length > 8 ? `, ... ${value.length - 8} more` : ''
      return `[${value
        .slice(0, 8)
        .map((item) => shown(item, depth + 1))
        .join(', ')}${more}]`
    }
    const prototype = Object.getPrototypeOf(value)
    if (prototype !== null && prototype !== Object.prototype) return `a ${typeName(value)}`
    const json = JSON.stringify(value)
    return json.length > 80 ? `${json.slice(0, 77)}...` : json
  } catch {
    return 'an object'
  }
}

/** In single quotes, control characters escaped. */
function quote(text: string): string {
  return `'${JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"')}'`
}

/** The name of an object's class. */
function typeName(value: object): string {
  const name: unknown = value.constructor?.name
  return typeof name === 'string' && name !== '' ? name : 'object'
}

/** The entry of `known` that `name` is most likely a misspelling of, or undefined where nothing comes near. */
export function closest(name: string, known: Iterable<string>): string | undefined {
  const wanted = plain(name)
  let best: string | undefined
  let least = Number.POSITIVE_INFINITY
  for (const candidate of known) {
    const other = plain(candidate)
    const edits = other.startsWith(wanted) && wanted.length > 2 ? 1 : distance(wanted, other)
    if (edits < least && edits <= Math.max(2, Math.ceil(other.length / 3))) {
      least = edits
      best = candidate
    }
  }
  return best
}

/** A sentence's end for an unknown name: `did you mean 'x'? Known are: ...`. */
export function suggest(name: unknown, known: readonly string[]): string {
  const match = typeof name === 'string' ? closest(name, known) : undefined
  return match === undefined ? `expected one of ${known.join(', ')}` : `did you mean '${match}'? Known: ${known.join(', ')}`
}

/** Lower case without separators: 'AdaKV', 'ada_kv' and 'ada-kv' are one name. */
function plain(name: string): string {
  return name
    .slice(0, 64)
    .toLowerCase()
    .replace(/[^a-z0-9]/g, '')
}

/** Edits (insert, delete, replace, swap of neighbours) that turn `a` into `b`. */
function distance(a: string, b: string): number {
  let before: number[] = []
  let last = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    const row = [i]
    for (let j = 1; j <= b.length; j++) {
      const same = a[i - 1] === b[j - 1]
      let edits = Math.min(last[j]! + 1, row[j - 1]! + 1, last[j - 1]! + (same ? 0 : 1))
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) edits = Math.min(edits, before[j - 2]! + 1)
      row.push(edits)
    }
    before = last
    last = row
  }
  return last[b.length]!
}
