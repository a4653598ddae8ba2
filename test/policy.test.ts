import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { LaproxError } from '../lib/errors.js'
import {
  type Budget,
  type Policy,
  type PolicyOptions,
  policies,
  policy,
  presetNames,
  type RandomOptions,
  type ScoreRule,
  validatePolicy,
} from '../lib/policy.js'

function expectFailure(call: () => unknown, ...parts: string[]): void {
  let error: unknown
  try {
    call()
  } catch (thrown) {
    error = thrown
  }
  expect(error).toBeInstanceOf(LaproxError)
  expect((error as LaproxError).code).toBe('INVALID_ARGUMENT')
  for (const part of parts) expect((error as LaproxError).message).toContain(part)
}

function isDeeplyFrozen(value: unknown): boolean {
  return typeof value !== 'object' || value === null || (Object.isFrozen(value) && Object.values(value).every(isDeeplyFrozen))
}

const common = { window: 32, budget: { ratio: 0.05 }, floor: 0, sinks: 4, recent: 32, pinned: [], nonFinite: 'error' }
const meanAttention = { statistic: 'factored', attention: 'mean', value: 'none', aggregation: 'mean' }
const critical = { ...meanAttention, value: 'projected-l1' }
const none = { kind: 'none' }
const max7 = { kind: 'max', width: 7 }
const mean5 = { kind: 'mean', width: 5 }

describe('presets', () => {
  const expected: Record<keyof typeof policies, object> = {
    laprox: { name: 'laprox', score: { statistic: 'joint' }, pooling: max7, scope: 'model' },
    laproxBound: { name: 'laprox-bound', score: { statistic: 'bound' }, pooling: max7, scope: 'model' },
    laproxRemoval: { name: 'laprox-removal', score: { statistic: 'removal' }, pooling: max7, scope: 'model' },
    snapkv: { name: 'snapkv', score: meanAttention, pooling: mean5, scope: 'head' },
    pyramidkv: { name: 'pyramidkv', score: meanAttention, pooling: mean5, scope: 'head', pyramidBeta: 20 },
    adakv: { name: 'adakv', score: meanAttention, pooling: mean5, scope: 'layer', floor: 0.2 },
    criticalkv: { name: 'criticalkv', score: critical, pooling: mean5, scope: 'head' },
    criticalAdakv: { name: 'critical-adakv', score: critical, pooling: mean5, scope: 'layer', floor: 0.2 },
    vatp: { name: 'vatp', score: { ...meanAttention, attention: 'sum', value: 'l1' }, pooling: none, scope: 'head' },
    kvCompress: {
      name: 'kv-compress',
      score: { ...meanAttention, attention: 'l2', aggregation: 'rss' },
      pooling: max7,
      scope: 'model',
    },
    tova: {
      name: 'tova',
      score: { ...meanAttention, attention: 'last', sharing: 'layer' },
      pooling: none,
      scope: 'head',
      window: 1,
      recent: 1,
    },
    streaming: { name: 'streaming', score: { statistic: 'recency' }, pooling: none, scope: 'head' },
    knorm: { name: 'knorm', score: { statistic: 'key-norm' }, pooling: none, scope: 'head' },
    random: { name: 'random', score: { statistic: 'random', seed: 0 }, pooling: none, scope: 'head' },
  }

  it.each(Object.entries(expected))('%s', (key, fields) => {
    const made = policies[key as keyof typeof policies]({ keep: 0.05 })
    expect(made).toStrictEqual({ ...common, ...fields })
    expect(policy(made.name, { keep: 0.05 })).toStrictEqual(made)
    expect(presetNames).toContain(made.name)
    expect(isDeeplyFrozen(made)).toBe(true)
  })

  it('are all there', () => {
    expect(Object.keys(policies).sort()).toEqual(Object.keys(expected).sort())
    expect(presetNames.length).toBe(14)
    expect(Object.isFrozen(policies) && Object.isFrozen(presetNames)).toBe(true)
  })

  it('take options', () => {
    const options: PolicyOptions = {
      keep: { entries: 4096 },
      window: 16,
      sinks: 0,
      pooling: { kind: 'mean', width: 9 },
      scope: 'layer',
      floor: 0.5,
      layerWeights: [1, 2.5, 0],
      pinned: [
        [5, 5],
        [10, 20],
      ],
      nonFinite: 'keep',
    }
    expect(policies.laprox(options)).toStrictEqual({
      name: 'laprox',
      window: 16,
      score: { statistic: 'joint' },
      layerWeights: [1, 2.5, 0],
      pooling: { kind: 'mean', width: 9 },
      scope: 'layer',
      budget: { entries: 4096 },
      floor: 0.5,
      sinks: 0,
      recent: 16,
      pinned: [
        [5, 5],
        [10, 20],
      ],
      nonFinite: 'keep',
    })
    expect(policies.laprox({ keep: { bytes: 1e9 }, recent: 0, window: undefined })).toMatchObject({ budget: { bytes: 1e9 }, recent: 0, window: 32 })
    expect(policies.laprox({ keep: { ratio: 1 } }).budget).toEqual({ ratio: 1 })
    expect(policies.random({ keep: 0.1, seed: 7 }).score).toEqual({ statistic: 'random', seed: 7 })
    expect(policies.pyramidkv({ keep: 0.1, pyramidBeta: 3 }).pyramidBeta).toBe(3)
    expect(policies.pyramidkv({ keep: 0.1, pyramidBeta: 0, scope: 'layer' }).pyramidBeta).toBe(0)
  })

  it('copy what they are given', () => {
    const layerWeights = [1, 2]
    const made = policies.laprox({ keep: 0.1, layerWeights })
    layerWeights[0] = 5
    expect(made.layerWeights).toEqual([1, 2])
    expect(Object.isFrozen(layerWeights)).toBe(false)
  })
})

describe('policy', () => {
  it.each([
    ['snapvk', "'snapvk' is no preset; did you mean 'snapkv'?"],
    ['laproxBound', "did you mean 'laprox-bound'?"],
    ['LaProx', "did you mean 'laprox'?"],
    ['AdaKV', "did you mean 'adakv'?"],
    ['no such thing', 'expected one of laprox, laprox-bound'],
    ['toString', "'toString' is no preset"],
    [undefined as never, 'undefined is no preset'],
  ])('refuses the name %s', (name, message) => {
    expectFailure(() => policy(name, { keep: 0.1 }), message)
  })

  it.each([
    ['no options', undefined, 'options of laprox is missing; expected an object'],
    ['no keep', {}, 'options of laprox: keep is missing'],
    ['ratio 0', { keep: 0 }, 'options of laprox: keep is 0; expected a ratio in (0, 1]'],
    ['a ratio of -0', { keep: -0 }, 'keep is 0'],
    ['a negative ratio', { keep: -0.5 }, 'keep is -0.5'],
    ['NaN', { keep: Number.NaN }, 'keep is NaN'],
    ['a count', { keep: 4096 }, 'keep is 4096; expected a ratio in (0, 1]: the share that is kept (for a count, use { entries: 4096 })'],
    ['a text', { keep: '5%' }, "keep is '5%'; expected one of { ratio }, { entries } or { bytes }"],
    ['an empty budget', { keep: {} }, 'keep is {}; expected one of'],
    ['two budgets', { keep: { ratio: 0.5, entries: 5 } }, 'expected one of { ratio }'],
    ['a misspelt budget', { keep: { entires: 5 } }, "unknown field 'entires'; did you mean 'entries'?"],
    ['half an entry', { keep: { entries: 0.5 } }, 'keep.entries is 0.5; expected an integer from 0'],
    ['negative bytes', { keep: { bytes: -1 } }, 'keep.bytes is -1'],
    ['an unknown option', { keep: 0.1, windows: 3 }, "unknown field 'windows'; did you mean 'window'?"],
    ['a seed', { keep: 0.1, seed: 3 }, "unknown field 'seed'"],
    ['a beta', { keep: 0.1, pyramidBeta: 3 }, "unknown field 'pyramidBeta'"],
    ['window 0', { keep: 0.1, window: 0 }, 'window is 0; expected an integer from 1 to 128'],
    ['window 129', { keep: 0.1, window: 129 }, 'window is 129'],
    ['an even pooling', { keep: 0.1, pooling: { kind: 'max', width: 4 } }, 'pooling.width is 4; expected an odd integer from 1 to 255'],
    ['a wide pooling', { keep: 0.1, pooling: { kind: 'max', width: 257 } }, 'pooling.width is 257'],
    ['a fractional pooling', { keep: 0.1, pooling: { kind: 'max', width: 2.5 } }, 'pooling.width is 2.5'],
    ['a pooling without a width', { keep: 0.1, pooling: { kind: 'max' } }, 'pooling.width is missing'],
    ['a width of none', { keep: 0.1, pooling: { kind: 'none', width: 3 } }, "pooling: unknown field 'width'"],
    ['another pooling', { keep: 0.1, pooling: { kind: 'average', width: 3 } }, "pooling.kind is 'average'; expected one of none, max, mean"],
    ['a null', { keep: 0.1, pooling: null }, 'pooling is null; expected an object'],
    ['another scope', { keep: 0.1, scope: 'layers' }, "scope is 'layers'; did you mean 'layer'?"],
    ['a floor above 1', { keep: 0.1, floor: 1.1 }, 'floor is 1.1; expected a number from 0 to 1'],
    ['sinks below 0', { keep: 0.1, sinks: -1 }, 'sinks is -1'],
    ['too many recent', { keep: 0.1, recent: 2 ** 31 }, 'recent is 2147483648; expected an integer from 0 to 2147483647'],
    ['a flat range', { keep: 0.1, pinned: [5, 6] }, 'pinned[0] is 5; expected [begin, end)'],
    ['a long range', { keep: 0.1, pinned: [[5, 6, 7]] }, 'pinned[0] is [5, 6, 7]'],
    [
      'a reversed range',
      {
        keep: 0.1,
        pinned: [
          [0, 1],
          [6, 5],
        ],
      },
      'pinned[1] is [6, 5]',
    ],
    ['ranges that are none', { keep: 0.1, pinned: 'all' }, "pinned is 'all'"],
    ['weights that are none', { keep: 0.1, layerWeights: 2 }, 'layerWeights is 2'],
    ['an infinite weight', { keep: 0.1, layerWeights: [1, Number.POSITIVE_INFINITY] }, 'layerWeights[1] is Infinity'],
    ['a negative weight', { keep: 0.1, layerWeights: [-1] }, 'layerWeights[0] is -1'],
    ['a hole in the weights', { keep: 0.1, layerWeights: new Array(1) }, 'layerWeights[0] is missing'],
    ['another nonFinite', { keep: 0.1, nonFinite: 'ignore' }, "nonFinite is 'ignore'"],
  ])('refuses %s', (_what, options, message) => {
    expectFailure(() => policy('laprox', options as never), message)
  })

  it('refuses a seed or a beta that cannot be', () => {
    expectFailure(() => policies.random({ keep: 0.1, seed: -1 }), 'options of random: seed is -1')
    expectFailure(() => policies.random({ keep: 0.1, seed: 2 ** 53 }), 'seed is 9007199254740992')
    expectFailure(() => policies.pyramidkv({ keep: 0.1, pyramidBeta: 0.5 }), 'pyramidBeta is 0.5; expected a number from 1 to 1e8')
    expectFailure(() => policies.pyramidkv({ keep: 0.1, scope: 'model' }), 'pyramidBeta is 20; expected scope head')
  })
})

describe('validatePolicy', () => {
  const good = policies.laprox({ keep: 0.05, layerWeights: [1, 2], pinned: [[1, 2]] })

  it('gives known policies back as they are, and others checked, frozen and in order', () => {
    expect(validatePolicy(good)).toBe(good)
    const parsed: Policy = JSON.parse(JSON.stringify(good))
    const checked = validatePolicy(parsed)
    expect(checked).not.toBe(parsed)
    expect(checked).toStrictEqual(good)
    expect(isDeeplyFrozen(checked)).toBe(true)
    expect(validatePolicy(checked)).toBe(checked)
    const shuffled = Object.fromEntries(Object.entries(parsed).reverse())
    expect(JSON.stringify(validatePolicy(shuffled))).toBe(JSON.stringify(good))
    expect(validatePolicy({ ...good, name: 'mine', layerWeights: undefined })).not.toHaveProperty('layerWeights')
  })

  it.each([
    ['nothing', undefined, 'policy is missing; expected an object'],
    ['null', null, 'policy is null'],
    ['an array', [], 'policy is []'],
    ['a name', 'laprox', "policy is 'laprox'"],
    ['no name', { ...good, name: undefined }, 'policy: name is missing'],
    ['no window', { ...good, window: undefined }, 'policy: window is missing; expected an integer from 1 to 128'],
    ['no scope', { ...good, scope: undefined }, 'policy: scope is missing; expected one of model, layer, head'],
    ['an unknown field', { ...good, layerWeight: [1] }, "policy: unknown field 'layerWeight'; did you mean 'layerWeights'?"],
    ['a ratio above 1', { ...good, budget: { ratio: 2 } }, 'policy: budget.ratio is 2'],
    ['a number for a budget', { ...good, budget: 0.05 }, 'policy: budget is 0.05; expected one of { ratio }'],
    ['no statistic', { ...good, score: {} }, 'policy: score.statistic is missing'],
    ['an unknown statistic', { ...good, score: { statistic: 'joints' } }, "did you mean 'joint'?"],
    ['a factor for joint', { ...good, score: { statistic: 'joint', value: 'l1' } }, "policy: score: unknown field 'value'"],
    ['an unknown attention', { ...good, score: { ...meanAttention, attention: 'mena' } }, "policy: score.attention is 'mena'; did you mean 'mean'?"],
    ['an unknown value', { ...good, score: { ...meanAttention, value: 'projectedL1' } }, "did you mean 'projected-l1'?"],
    ['no aggregation', { ...good, score: { ...meanAttention, aggregation: undefined } }, 'score.aggregation is missing'],
    ['another sharing', { ...good, score: { ...meanAttention, sharing: 'model' } }, "score.sharing is 'model'"],
    ['a seed of text', { ...good, score: { statistic: 'random', seed: '1' } }, "score.seed is '1'"],
  ])('refuses %s', (_what, value, message) => {
    expectFailure(() => validatePolicy(value), message)
  })

  it('survives JSON', () => {
    const scores: fc.Arbitrary<ScoreRule> = fc.oneof(
      fc.record({ statistic: fc.constantFrom('joint', 'bound', 'removal', 'key-norm', 'recency') }) as fc.Arbitrary<ScoreRule>,
      fc.record({ statistic: fc.constant('random' as const), seed: fc.maxSafeNat() }),
      fc.record(
        {
          statistic: fc.constant('factored' as const),
          attention: fc.constantFrom('mean', 'sum', 'l2', 'max', 'last', 'none'),
          value: fc.constantFrom('none', 'l1', 'l2', 'projected-l1', 'projected-l2'),
          aggregation: fc.constantFrom('mean', 'sum', 'max', 'rss'),
          sharing: fc.constantFrom('group', 'layer'),
        },
        { requiredKeys: ['statistic', 'attention', 'value', 'aggregation'] },
      ) as fc.Arbitrary<ScoreRule>,
    )
    const budgets: fc.Arbitrary<Budget> = fc.oneof(
      fc.record({ ratio: fc.double({ min: Number.MIN_VALUE, max: 1, noNaN: true }) }),
      fc.record({ entries: fc.constantFrom(0, -0, 5, Number.MAX_SAFE_INTEGER) }),
      fc.record({ bytes: fc.maxSafeNat() }),
    )
    const fields = {
      name: fc.string(),
      window: fc.integer({ min: 1, max: 128 }),
      score: scores,
      layerWeights: fc.array(fc.double({ min: 0, max: 3e38, noNaN: true })),
      pooling: fc.oneof(
        fc.constant({ kind: 'none' as const }),
        fc.record({ kind: fc.constantFrom('max' as const, 'mean' as const), width: fc.nat(127).map((n) => 2 * n + 1) }),
      ),
      scope: fc.constant('head' as const),
      budget: budgets,
      floor: fc.double({ min: -0, max: 1, noNaN: true }),
      pyramidBeta: fc.double({ min: 1, max: 1e8, noNaN: true }),
      sinks: fc.constantFrom(0, -0, 4),
      recent: fc.nat(2 ** 31 - 1),
      pinned: fc.array(fc.tuple(fc.nat(100), fc.nat(100)).map(([begin, length]) => [begin, begin + length] as const)),
      nonFinite: fc.constantFrom('error' as const, 'keep' as const),
    }
    const { layerWeights: _weights, pyramidBeta: _beta, ...required } = fields
    const any = fc.record(fields, { requiredKeys: Object.keys(required) as (keyof typeof required)[] })
    fc.assert(
      fc.property(any, (value) => {
        const checked = validatePolicy(value)
        const json = JSON.stringify(checked)
        expect(JSON.parse(json)).toStrictEqual(checked)
        expect(validatePolicy(JSON.parse(json))).toStrictEqual(checked)
        expect(JSON.stringify(validatePolicy(JSON.parse(json)))).toBe(json)
        expect(isDeeplyFrozen(checked)).toBe(true)
      }),
      { seed: 7, numRuns: 300 },
    )
  })

  it('throws nothing but LaproxError', () => {
    const check = (call: () => unknown): void => {
      try {
        call()
      } catch (error) {
        expect(error).toBeInstanceOf(LaproxError)
      }
    }
    const keys = [...Object.keys(good), 'pyramidBeta'] as (keyof Policy)[]
    fc.assert(
      fc.property(fc.constantFrom(...keys), fc.anything(), (key, value) => {
        check(() => validatePolicy({ ...good, [key]: value }))
        check(() => validatePolicy(value))
        check(() => policy('random', { keep: 0.5, [key]: value } as RandomOptions))
        check(() => policy('random', value as never))
      }),
      { seed: 8, numRuns: 500 },
    )
  })
})
