import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { closest, LaproxError, show, suggest, throwIfAborted } from '../lib/errors.js'

describe('LaproxError', () => {
  it('is an Error with a name, a code, a message and a cause', () => {
    const cause = new Error('why')
    const error = new LaproxError('OUT_OF_PAGES', 'too few', { cause })
    expect(error).toBeInstanceOf(Error)
    expect(error).toBeInstanceOf(LaproxError)
    expect(error).toMatchObject({ name: 'LaproxError', code: 'OUT_OF_PAGES', message: 'too few', cause })
    expect(String(error)).toBe('LaproxError: too few')
    expect(error.stack).toMatch(/^LaproxError: too few\n/)
    expect('cause' in new LaproxError('IO', 'x')).toBe(false)
    expect(Object.keys(error)).toEqual(['code'])
  })
})

describe('throwIfAborted', () => {
  it('throws ABORTED with the reason as its cause', () => {
    expect(() => throwIfAborted(undefined)).not.toThrow()
    expect(() => throwIfAborted(new AbortController().signal)).not.toThrow()
    const reason = { because: 1 }
    expect(() => throwIfAborted(AbortSignal.abort(reason))).toThrow(expect.objectContaining({ code: 'ABORTED', cause: reason }))
  })
})

describe('show', () => {
  it.each([
    [undefined, 'undefined'],
    [null, 'null'],
    [1.5, '1.5'],
    [Number.NaN, 'NaN'],
    [7n, '7n'],
    [true, 'true'],
    [Symbol('s'), 'Symbol(s)'],
    [() => 1, 'a function'],
    ['a"b', `'a"b'`],
    ['a\nb', `'a\\nb'`],
    ['x'.repeat(100), `'${'x'.repeat(77)}...'`],
    [[1, [2, [3, [4]]]], '[1, [2, [...]]]'],
    [[8, 100, 64], '[8, 100, 64]'],
    [Array.from({ length: 20 }, (_, i) => i), '[0, 1, 2, 3, 4, 5, 6, 7, ... 12 more]'],
    [{ a: 1 }, '{"a":1}'],
    [{ a: 'x'.repeat(100) }, `{"a":"${'x'.repeat(71)}...`],
    [Object.create(null), '{}'],
    [new Float32Array(3), 'Float32Array(3)'],
    [new DataView(new ArrayBuffer(5)), 'DataView(5)'],
    [new Map(), 'a Map'],
    [Object.create({}), 'a Object'],
    [Object.create({ constructor: { name: 7 } }), 'a object'],
    [{ toJSON: () => undefined }, 'an object'],
  ])('%#', (value, text) => {
    expect(show(value)).toBe(text)
  })

  it('never throws and stays on a line', () => {
    const hostile = new Proxy(
      {},
      {
        getPrototypeOf: () => ({}),
        get: () => {
          throw new Error('no')
        },
      },
    )
    expect(show(hostile)).toBe('an object')
    fc.assert(
      fc.property(fc.anything({ withTypedArray: true, withBigInt: true, withNullPrototype: true }), (value) => {
        const text = show(value)
        expect(text).not.toContain('\n')
        expect(text.length).toBeLessThan(8 * 8 * 100)
      }),
      { seed: 1, numRuns: 300 },
    )
  })
})

describe('closest', () => {
  const names = ['laprox', 'laprox-bound', 'snapkv', 'adakv', 'critical-adakv', 'kv-compress', 'tova']
  it.each([
    ['lapros', 'laprox'],
    ['LaProx', 'laprox'],
    ['laproxBound', 'laprox-bound'],
    ['snpakv', 'snapkv'],
    ['snap', 'snapkv'],
    ['ada_kv', 'adakv'],
    ['criticalAdaKV', 'critical-adakv'],
    ['compress', 'kv-compress'],
    ['tovva', 'tova'],
    ['', undefined],
    ['something else', undefined],
    ['x'.repeat(100000), undefined],
  ])('%s', (name, expected) => {
    expect(closest(name, names)).toBe(expected)
  })

  it('finds a name itself, whatever stands beside it', () => {
    for (const name of names) expect(closest(name, names)).toBe(name)
  })

  it('makes the end of a sentence', () => {
    expect(suggest('snapvk', ['snapkv', 'tova'])).toBe("did you mean 'snapkv'? Known: snapkv, tova")
    expect(suggest('zzz', ['snapkv', 'tova'])).toBe('expected one of snapkv, tova')
    expect(suggest(7, ['snapkv'])).toBe('expected one of snapkv')
  })
})
