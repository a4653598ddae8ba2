import { runInNewContext } from 'node:vm'
import fc from 'fast-check'
import { describe, expect, expectTypeOf, it } from 'vitest'
import type { LaproxErrorCode } from '../lib/errors.js'
import { LaproxError } from '../lib/errors.js'
import {
  describe as describeTensor,
  elementBytes,
  fromFloat32,
  packed,
  Tensor,
  type TensorDataMap,
  type TensorInput,
  tensorTypes,
  toFloat32,
} from '../lib/tensor.js'

/** The LaproxError that `call` throws. */
function failure(call: () => unknown): LaproxError {
  try {
    call()
  } catch (error) {
    expect(error).toBeInstanceOf(LaproxError)
    return error as LaproxError
  }
  throw new Error('nothing was thrown')
}

function expectFailure(call: () => unknown, code: LaproxErrorCode, ...parts: string[]): void {
  const error = failure(call)
  expect(error.code).toBe(code)
  for (const part of parts) expect(error.message).toContain(part)
}

/** Loses the buffer of a typed array. */
function detach(data: ArrayBufferView): void {
  structuredClone(data.buffer, { transfer: [data.buffer as ArrayBuffer] })
}

const seed = 42

describe('Tensor', () => {
  it('views a typed array', () => {
    const data = new Float32Array(24)
    const dims = [2, 3, 4]
    const tensor = new Tensor('float32', data, dims)
    dims[0] = 9
    expect(tensor).toMatchObject({ type: 'float32', dims: [2, 3, 4], strides: [12, 4, 1], offset: 0, size: 24 })
    expect(tensor.data).toBe(data)
    expect(tensor.location).toBe('cpu')
    expect(tensor.contiguous).toBe(true)
    expect(tensor.disposed).toBe(false)
    expect(describeTensor(tensor)).toBe('float32 [2, 3, 4]')
    expectTypeOf(tensor.data).toEqualTypeOf<Float32Array>()
    expectTypeOf(tensor).toExtend<Tensor>()
  })

  it('takes scalars and empty tensors', () => {
    expect(new Tensor('int64', new BigInt64Array(1), [])).toMatchObject({ dims: [], strides: [], size: 1, contiguous: true })
    expect(new Tensor('int32', new Int32Array(0), [3, 0, 2])).toMatchObject({ size: 0, contiguous: true })
    expectFailure(() => Tensor.zeros('int32', [0, 2 ** 50, 2 ** 50]), 'INVALID_ARGUMENT', 'more than 9007199254740991')
    expect(new Tensor('int32', new Int32Array(5), [0], { offset: 5 }).size).toBe(0)
  })

  it('makes large zeros that are as long as asked for', () => {
    for (const size of [2 ** 19 - 1, 2 ** 19, 2 ** 20 + 1]) {
      const { data } = Tensor.zeros('float64', [size])
      expect(data.length).toBe(size)
      expect(data.every((x) => x === 0)).toBe(true)
      data.fill(1)
      expect(data.buffer.byteLength - data.byteOffset).toBeGreaterThanOrEqual(8 * size)
    }
  })

  it('makes zeros of every type', () => {
    for (const type of tensorTypes) {
      const tensor = Tensor.zeros(type, [2, 3])
      expect(tensor).toMatchObject({ type, dims: [2, 3], size: 6 })
      expect(tensor.data.length).toBe(6)
      expect(tensor.data.BYTES_PER_ELEMENT).toBe(elementBytes(type))
      expect(tensor.data.every((value) => Number(value) === 0)).toBe(true)
    }
    expectTypeOf(Tensor.zeros('bfloat16', [1]).data).toEqualTypeOf<Uint16Array>()
  })

  it('says when memory is short', () => {
    expectFailure(() => Tensor.zeros('float64', [2 ** 26, 2 ** 26]), 'OUT_OF_MEMORY', 'float64 [67108864, 67108864]')
    expectFailure(() => Tensor.zeros('float' as 'float32', [1]), 'INVALID_ARGUMENT', "type is 'float'")
  })

  it('keeps packed planes apart by strides', () => {
    // K and V side by side: [token, 2, head, d]
    const data = Float32Array.from({ length: 5 * 2 * 3 * 4 }, (_, i) => i)
    const value = new Tensor('float32', data, [3, 5, 4], { strides: [4, 24, 1], offset: 12 })
    expect(value.contiguous).toBe(false)
    expect(value.at(1).at(2)).toMatchObject({ dims: [4], strides: [1], offset: 12 + 4 + 48 })
    expect(Array.from(packed(value.at(1).at(2)))).toEqual([64, 65, 66, 67])
  })

  it.each([
    ['a string', 'data', "data is 'x'", () => new Tensor('float32', 'x' as never, [1])],
    ['another array', 'data', 'expected Float32Array for type float32', () => new Tensor('float32', new Int32Array(1) as never, [1])],
    ['a wrong prototype', 'data', 'expected Float32Array', () => new Tensor('float32', Object.create(Float32Array.prototype), [1])],
    ['a DataView', 'data', 'data is DataView(4)', () => new Tensor('float32', new DataView(new ArrayBuffer(4)) as never, [1])],
    ['an unknown type', 'type', "did you mean 'float16'?", () => new Tensor('Float-16' as 'float16', new Uint16Array(1), [1])],
    ['a property of Object', 'type', "type is 'toString'", () => new Tensor('toString' as 'float16', new Uint16Array(1), [1])],
    ['no type', 'type', 'type is undefined', () => new Tensor(undefined as unknown as 'float16', new Uint16Array(1), [1])],
    [
      'too few elements',
      'data',
      'data is Float32Array(3) and dims are [2, 2]; expected 4 elements',
      () => new Tensor('float32', new Float32Array(3), [2, 2]),
    ],
    ['too many elements', 'data', 'expected 4 elements', () => new Tensor('float32', new Float32Array(5), [2, 2])],
    ['no dims', 'dims', 'dims is undefined', () => new Tensor('float32', new Float32Array(1), undefined as never)],
    ['a fraction', 'dims', 'dims[1] of [1, 0.5] is 0.5', () => new Tensor('float32', new Float32Array(1), [1, 0.5])],
    ['a negative dim', 'dims', 'dims[0] of [-1] is -1', () => new Tensor('float32', new Float32Array(1), [-1])],
    ['a bigint', 'dims', 'dims[0] of [1n] is 1n', () => new Tensor('float32', new Float32Array(1), [1n as never])],
    ['a hole', 'dims', 'dims[0] of [] is undefined', () => new Tensor('float32', new Float32Array(1), new Array(1))],
    ['an overflow', 'dims', 'more than 9007199254740991', () => new Tensor('float32', new Float32Array(1), [2 ** 50, 2 ** 50])],
    ['too few strides', 'strides', 'expected 2 integers', () => new Tensor('float32', new Float32Array(4), [2, 2], { strides: [1] })],
    ['a negative stride', 'strides', 'strides[1] of [2, -1] is -1', () => new Tensor('float32', new Float32Array(4), [2, 2], { strides: [2, -1] })],
    ['a negative offset', 'offset', 'offset is -1', () => new Tensor('float32', new Float32Array(4), [2], { offset: -1 })],
    ['an offset that is none', 'offset', "offset is '1'", () => new Tensor('float32', new Float32Array(4), [2], { offset: '1' as never })],
  ])('refuses %s', (_what, argument, message, call) => {
    expectFailure(call, 'INVALID_ARGUMENT', argument, message)
  })

  it('refuses strides and offsets that leave the data', () => {
    const data = new Float32Array(10)
    expect(new Tensor('float32', data, [2, 3], { strides: [7, 1] }).size).toBe(6)
    expectFailure(
      () => new Tensor('float32', data, [2, 3], { strides: [8, 1] }),
      'OUT_OF_BOUNDS',
      'dims [2, 3] with strides [8, 1] and offset 0 need 11 elements; data has 10',
    )
    expectFailure(() => new Tensor('float32', data, [2, 3], { offset: 5 }), 'OUT_OF_BOUNDS', 'need 11 elements')
    expectFailure(() => new Tensor('float32', data, [0], { offset: 11 }), 'OUT_OF_BOUNDS')
    expectFailure(() => new Tensor('float32', data, [3, 3], { strides: [2 ** 52, 2 ** 52] }), 'OUT_OF_BOUNDS')
    expect(new Tensor('float32', data, [1000], { strides: [0], offset: 9 }).size).toBe(1000)
  })

  it('refuses buffers that can change their size', () => {
    const Resizable = ArrayBuffer as unknown as new (length: number, options: { maxByteLength: number }) => ArrayBuffer
    const Growable = SharedArrayBuffer as unknown as new (length: number, options: { maxByteLength: number }) => SharedArrayBuffer
    const resizable = new Float32Array(new Resizable(16, { maxByteLength: 32 }), 0, 4)
    expectFailure(() => new Tensor('float32', resizable, [4]), 'INVALID_ARGUMENT', 'resizable')
    const growable = new Float32Array(new Growable(16, { maxByteLength: 32 }), 0, 4)
    expectFailure(() => new Tensor('float32', growable, [4]), 'INVALID_ARGUMENT', 'growable')
    expect(new Tensor('float32', new Float32Array(new SharedArrayBuffer(16)), [4]).size).toBe(4)
  })

  it('takes typed arrays of other realms', () => {
    const data: Float32Array = runInNewContext('new Float32Array([1, 2])')
    expect(data instanceof Float32Array).toBe(false)
    expect(new Tensor('float32', data, [2]).data).toBe(data)
    expectFailure(() => new Tensor('int32', data as never, [2]), 'INVALID_ARGUMENT', 'expected Int32Array')
  })

  it('takes a Float16Array as the bits it holds', () => {
    type Float16 = new (values: number[]) => TensorInput<'float16'>
    const { Float16Array } = globalThis as { Float16Array?: Float16 }
    // Of another realm, so that it is no Uint16Array of this one, as the real one is none.
    const standIn = `class Float16Array extends Uint16Array { get [Symbol.toStringTag]() { return 'Float16Array' } }`
    const data: TensorInput<'float16'> =
      Float16Array === undefined ? runInNewContext(`${standIn}; new Float16Array([0, 0x3c00, 0xc000]).subarray(1)`) : new Float16Array([1, -2])
    const tensor = new Tensor('float16', data, [2])
    expect(tensor.data.buffer).toBe(data.buffer)
    expect(Array.from(tensor.data)).toEqual([0x3c00, 0xc000])
    expect(Array.from(toFloat32(tensor))).toEqual([1, -2])
  })

  it('tells a detached buffer', () => {
    const data = new Float32Array(4)
    const tensor = new Tensor('float32', data, [2, 2])
    const row = tensor.at(1)
    detach(data)
    expectFailure(() => tensor.data, 'DETACHED', 'float32 [2, 2]')
    expectFailure(() => row.data, 'DETACHED', 'float32 [2]')
    expectFailure(() => tensor.at(0), 'DETACHED')
    expectFailure(() => new Tensor('float32', data, [2, 2]), 'DETACHED', 'Float32Array(0)')
    expectFailure(() => new Tensor('float32', data, [2, 2], { offset: 0 }), 'DETACHED')
  })

  it('is disposed of with its views, and of a view alone', () => {
    const tensor = Tensor.zeros('float32', [2, 2, 2])
    const middle = tensor.at(0)
    const inner = middle.at(0)
    middle.dispose()
    middle.dispose()
    expect([tensor.disposed, middle.disposed, inner.disposed]).toEqual([false, true, false])
    expectFailure(() => middle.data, 'DISPOSED', 'float32 [2, 2]')
    expect(inner.data).toBe(tensor.data)
    tensor[Symbol.dispose]()
    expect([tensor.disposed, inner.disposed]).toEqual([true, true])
    expectFailure(() => tensor.data, 'DISPOSED')
    expectFailure(() => inner.data, 'DISPOSED', 'float32 [2]')
    expectFailure(() => inner.at(0), 'DISPOSED')
    expectFailure(() => packed(inner), 'DISPOSED')
    let seen: Tensor
    {
      using scoped = Tensor.zeros('int32', [1])
      seen = scoped
    }
    expect(seen.disposed).toBe(true)
  })

  it('indexes and slices the first dimension', () => {
    const tensor = new Tensor(
      'int32',
      Int32Array.from({ length: 12 }, (_, i) => i),
      [4, 3],
    )
    expect(Array.from(packed(tensor.at(1)))).toEqual([3, 4, 5])
    expect(Array.from(packed(tensor.at(-1)))).toEqual([9, 10, 11])
    expect(Array.from(packed(tensor.at(3).at(2)))).toEqual([11])
    expect(tensor.subarray(1, 3)).toMatchObject({ dims: [2, 3], offset: 3 })
    expect(tensor.subarray(1)).toMatchObject({ dims: [3, 3], offset: 3 })
    expect(tensor.subarray(4)).toMatchObject({ dims: [0, 3], size: 0 })
    expectFailure(() => tensor.at(4), 'OUT_OF_BOUNDS', 'index is 4; expected an integer from -4 to 3 for dims [4, 3]')
    expectFailure(() => tensor.at(-5), 'OUT_OF_BOUNDS', 'index is -5')
    expectFailure(() => tensor.at(0.5), 'OUT_OF_BOUNDS', 'index is 0.5')
    expectFailure(() => tensor.at(Number.NaN), 'OUT_OF_BOUNDS', 'index is NaN')
    expectFailure(() => tensor.subarray(2, 1), 'OUT_OF_BOUNDS', '[2, 1)')
    expectFailure(() => tensor.subarray(0, 5), 'OUT_OF_BOUNDS', '[0, 5)')
    expectFailure(() => tensor.subarray(-1), 'OUT_OF_BOUNDS', '[-1, 4)')
    expectFailure(() => tensor.at(0).at(0).at(0), 'INVALID_ARGUMENT', 'scalar')
  })

  it('packs any strides in row-major order', () => {
    const shapes = fc
      .array(fc.record({ dim: fc.integer({ min: 0, max: 4 }), stride: fc.integer({ min: 0, max: 20 }) }), { maxLength: 4 })
      .chain((axes) => fc.tuple(fc.constant(axes), fc.nat(5), fc.constantFrom('float32', 'int64', 'uint8', 'bfloat16')))
    fc.assert(
      fc.property(shapes, ([axes, offset, type]) => {
        const dims = axes.map(({ dim }) => dim)
        const strides = axes.map(({ stride }) => stride)
        const data = Tensor.zeros(type, [400]).data
        for (let i = 0; i < data.length; i++) data[i] = (type === 'int64' ? BigInt(i % 256) : i % 256) as never
        const tensor = new Tensor(type, data as never, dims, { strides, offset })
        const expected: unknown[] = []
        const walk = (view: Tensor): void => {
          if (view.dims.length === 0) expected.push(view.data[view.offset])
          else for (let i = 0; i < view.dims[0]!; i++) walk(view.at(i))
        }
        walk(tensor)
        const result: TensorDataMap[typeof type] = packed(tensor)
        expect(Array.from(result as Iterable<unknown>)).toEqual(expected)
        if (tensor.contiguous && tensor.size > 0) expect(result.buffer).toBe(data.buffer)
      }),
      { seed, numRuns: 400 },
    )
  })
})

describe('conversion', () => {
  /** The value of 16 bits, by the definition of the format. */
  function decode(bits: number, exponentBits: number, fractionBits: number): number {
    const sign = bits & 0x8000 ? -1 : 1
    const exponent = (bits >> fractionBits) & (2 ** exponentBits - 1)
    const fraction = bits & (2 ** fractionBits - 1)
    const bias = 2 ** (exponentBits - 1) - 1
    if (exponent === 2 ** exponentBits - 1) return fraction ? Number.NaN : sign * Number.POSITIVE_INFINITY
    if (exponent === 0) return sign * fraction * 2 ** (1 - bias - fractionBits)
    return sign * (1 + fraction / 2 ** fractionBits) * 2 ** (exponent - bias)
  }
  const formats = [
    { type: 'float16', exponentBits: 5, fractionBits: 10 },
    { type: 'bfloat16', exponentBits: 8, fractionBits: 7 },
  ] as const
  const all = Uint16Array.from({ length: 65536 }, (_, i) => i)

  it.each(formats)('decodes and encodes all patterns of $type', ({ type, exponentBits, fractionBits }) => {
    const values = toFloat32(new Tensor(type, all, [256, 256]))
    const wrong: number[] = []
    for (let i = 0; i < 65536; i++) if (!Object.is(values[i], decode(i, exponentBits, fractionBits))) wrong.push(i)
    expect(wrong).toEqual([])
    const back = fromFloat32(type, values, [65536]).data
    for (let i = 0; i < 65536; i++) {
      const expected = Number.isNaN(values[i]) ? i | (1 << (fractionBits - 1)) : i
      if (back[i] !== expected) wrong.push(i)
    }
    expect(wrong).toEqual([])
  })

  it.each(formats)('rounds to the nearest $type, ties to even', ({ type, exponentBits, fractionBits }) => {
    // The finite magnitudes ascend with their bits, and infinity stands where the next one would.
    const infinity = (2 ** exponentBits - 1) << fractionBits
    const magnitude = (bits: number): number => {
      if (bits < infinity) return decode(bits, exponentBits, fractionBits)
      return 2 ** (2 ** (exponentBits - 1))
    }
    const reference = (value: number): number => {
      if (Number.isNaN(value)) return Number.NaN
      const wanted = Math.abs(value)
      let low = 0
      let high = infinity
      while (high - low > 1) {
        const middle = (low + high) >> 1
        if (magnitude(middle) <= wanted) low = middle
        else high = middle
      }
      const below = wanted - magnitude(low)
      const above = magnitude(high) - wanted
      const nearest = wanted >= magnitude(infinity) ? infinity : below < above || (below === above && low % 2 === 0) ? low : high
      return nearest | (Object.is(Math.sign(value), -1) || Object.is(value, -0) ? 0x8000 : 0)
    }
    const check = (values: Float32Array): void => {
      const bits = fromFloat32(type, values, [values.length]).data
      const wrong: number[] = []
      values.forEach((value, i) => {
        if (Number.isNaN(value) ? !Number.isNaN(toFloat32(new Tensor(type, bits.slice(i, i + 1), [1]))[0]) : bits[i] !== reference(value)) {
          wrong.push(value)
        }
      })
      expect(wrong).toEqual([])
    }
    // Values, midpoints to the next, and their neighbours.
    const float = new Float32Array(1)
    const pattern = new Int32Array(float.buffer)
    const edges: number[] = []
    for (let i = 0; i < infinity; i += type === 'float16' ? 3 : 7) {
      for (const value of [magnitude(i), (magnitude(i) + magnitude(i + 1)) / 2]) {
        float[0] = value
        if (!Number.isFinite(float[0])) continue
        const middle = pattern[0]!
        for (const step of [-1, 0, 1]) {
          pattern[0] = middle + step
          edges.push(float[0]!, -float[0]!)
        }
      }
    }
    check(Float32Array.from(edges))
    // Random patterns of all exponents.
    let state = 12345
    const random = Float32Array.from({ length: 50_000 }, () => {
      state = (Math.imul(state, 1664525) + 1013904223) | 0
      pattern[0] = state
      return float[0]!
    })
    check(random)
  })

  it('copies float32, keeps NaN payload quiet, and takes strides', () => {
    const source = new Float32Array([1, 2, 3, 4])
    const tensor = fromFloat32('float32', source, [2, 2])
    expect(tensor.data).not.toBe(source)
    expect(toFloat32(tensor)).not.toBe(tensor.data)
    expect(Array.from(toFloat32(new Tensor('float32', source, [2, 2], { strides: [1, 2] })))).toEqual([1, 3, 2, 4])
    expect(Array.from(toFloat32(new Tensor('bfloat16', new Uint16Array([0x3f80, 0, 0x4000]), [2], { strides: [2] })))).toEqual([1, 2])
    expect(toFloat32(Tensor.zeros('float16', [0])).length).toBe(0)
  })

  it('reads values at any offset of a buffer', () => {
    const values = new Float32Array(new ArrayBuffer(20), 4, 4)
    values.set([0.5, -1, 65520, 1e-9])
    expect(Array.from(fromFloat32('float16', values, [4]).data)).toEqual([0x3800, 0xbc00, 0x7c00, 0])
  })

  it('refuses what it cannot convert', () => {
    expectFailure(() => toFloat32(Tensor.zeros('int32', [1]) as never), 'INVALID_ARGUMENT', "tensor.type is 'int32'")
    expectFailure(() => fromFloat32('int32' as never, new Float32Array(1), [1]), 'INVALID_ARGUMENT', "type is 'int32'")
    expectFailure(() => fromFloat32('float16', new Float32Array(3), [2]), 'INVALID_ARGUMENT', 'expected 2 elements')
    expectFailure(() => fromFloat32('float16', [1] as never, [1]), 'INVALID_ARGUMENT', 'data is [1]')
    const disposed = Tensor.zeros('float16', [1])
    disposed.dispose()
    expectFailure(() => toFloat32(disposed), 'DISPOSED')
  })
})
