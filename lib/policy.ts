import { maxInt32, wrong } from './check.js'
import { LaproxError, show, suggest } from './errors.js'

/**
 * How much of one sequence's cache is kept: exactly one of
 * - `ratio`: floor(ratio * entries) of each part that the policy's scope names, 0 < ratio <= 1. Ratio means KEPT.
 * - `entries`: so many entries (one key and one value row of one KV head in one layer) of the whole sequence
 * - `bytes`: as many entries as fit in so many bytes of keys and values of the whole sequence
 */
export type Budget = { readonly ratio: number } | { readonly entries: number } | { readonly bytes: number }

/** What becomes of a query head's attention on one token over the m rows of the window. */
export type AttentionStatistic = 'mean' | 'sum' | 'l2' | 'max' | 'last' | 'none'

/** What a value row v counts; W_h is the slice of the output projection of query head h. `none` is 1. */
export type ValueStatistic = 'none' | 'l1' | 'l2' | 'projected-l1' | 'projected-l2'

/** How the query heads of a group become one number; `rss` is the root of the sum of squares. */
export type Aggregation = 'mean' | 'sum' | 'max' | 'rss'

/**
 * What an entry is worth. a_h is the column of window attention of query head h on the token, R the group's query heads.
 * - `joint`: ||sum over the group of a_h (x) v W_h||_F, the entry's exact contribution to the layer's output over the window
 * - `bound`: sum over the group of ||a_h|| ||v W_h||, an upper bound of it
 * - `removal`: the exact change of the layer's output when the entry goes and the softmax renormalises
 * - `factored`: (attention statistic, aggregated) * (value statistic, aggregated), the grid of the peers' rules. `sharing: 'layer'`
 *   aggregates the attention over all query heads of the layer, so that its KV heads rank alike; default 'group'.
 * - `key-norm`: -||k||_2
 * - `recency`: the position
 * - `random`: uniform in [0, 1), a function of seed, layer, head and position
 */
export type ScoreRule =
  | { readonly statistic: 'joint' | 'bound' | 'removal' }
  | {
      readonly statistic: 'factored'
      readonly attention: AttentionStatistic
      readonly value: ValueStatistic
      readonly aggregation: Aggregation
      readonly sharing?: 'group' | 'layer'
    }
  | { readonly statistic: 'key-norm' }
  | { readonly statistic: 'recency' }
  | { readonly statistic: 'random'; readonly seed: number }

/** Over neighbouring tokens of a head, protected ones included, truncated at the ends; `width` is odd, 1 to 255. */
export type Pooling = { readonly kind: 'none' } | { readonly kind: 'max' | 'mean'; readonly width: number }

/** What competes for one budget: all entries of a sequence, those of a layer, or those of a head. */
export type Scope = 'model' | 'layer' | 'head'

/** What a NaN or infinite score does: fail the call with `NON_FINITE`, or keep the entry and count it in the report. */
export type NonFinite = 'error' | 'keep'

/**
 * Everything that decides which entries of a cache stay. A policy is plain data: print it, compare it by deep equality, send
 * it as JSON and check what arrives with {@link validatePolicy}. The makers in {@link policies} give deeply frozen ones.
 */
export interface Policy {
  /** For reports; the preset's name. It decides nothing. */
  readonly name: string
  /** Rows m of the observation window, 1 to 128: the last queries, whose attention counts. */
  readonly window: number
  /** What an entry is worth. */
  readonly score: ScoreRule
  /** One factor of at least 0 per layer that multiplies its scores. Default: 1 each. */
  readonly layerWeights?: readonly number[]
  /** Smooths the scores before they are ranked. */
  readonly pooling: Pooling
  /** What competes for one budget. */
  readonly scope: Scope
  /** How much is kept, protected entries included. */
  readonly budget: Budget
  /** 0 to 1: the share of an even split of the unprotected budget that each head is given for its own best entries first. */
  readonly floor: number
  /** Scope `head` only: layer budgets fall linearly, more steeply with a larger beta; 1 to 1e8, or 0 for even budgets. */
  readonly pyramidBeta?: number
  /** Protected: the first so many positions. */
  readonly sinks: number
  /** Protected: the last so many positions. */
  readonly recent: number
  /** Protected: ranges [begin, end) of positions. */
  readonly pinned: readonly (readonly [begin: number, end: number])[]
  /** What a NaN or infinite score does. */
  readonly nonFinite: NonFinite
}

/** What every preset takes. All but `keep` default to the preset's own values. */
export interface PolicyOptions {
  /** A ratio in (0, 1] of what is KEPT, or a budget. */
  readonly keep: number | Budget
  /** Rows of the observation window, 1 to 128. Default 32; 1 for tova. */
  readonly window?: number | undefined
  /** Protected positions at the beginning. Default 4. */
  readonly sinks?: number | undefined
  /** Protected positions at the end. Default: the window. */
  readonly recent?: number | undefined
  /** Default: the preset's. */
  readonly pooling?: Pooling | undefined
  /** Default: the preset's. */
  readonly scope?: Scope | undefined
  /** 0 to 1. Default 0; .2 for adakv and critical-adakv. */
  readonly floor?: number | undefined
  /** One factor per layer. Default: none. */
  readonly layerWeights?: readonly number[] | undefined
  /** Protected ranges [begin, end) of positions. Default: none. */
  readonly pinned?: readonly (readonly [begin: number, end: number])[] | undefined
  /** Default 'error'. */
  readonly nonFinite?: NonFinite | undefined
}

/** What pyramidkv takes. */
export interface PyramidOptions extends PolicyOptions {
  /** How much steeper than even: 1 to 1e8, or 0 for even budgets. Default 20. */
  readonly pyramidBeta?: number | undefined
}

/** What random takes. */
export interface RandomOptions extends PolicyOptions {
  /** A non-negative safe integer. Default 0. */
  readonly seed?: number | undefined
}

/** The names of the presets, as {@link policy} takes them. */
export type PresetName =
  | 'laprox'
  | 'laprox-bound'
  | 'laprox-removal'
  | 'snapkv'
  | 'pyramidkv'
  | 'adakv'
  | 'criticalkv'
  | 'critical-adakv'
  | 'vatp'
  | 'kv-compress'
  | 'tova'
  | 'streaming'
  | 'knorm'
  | 'random'

/** What a preset decides. Sinks are 4, recent is the window, nothing is pinned, unless options say otherwise. */
interface Preset {
  readonly score: ScoreRule
  readonly pooling: Pooling
  readonly scope: Scope
  readonly window?: number
  readonly floor?: number
  readonly pyramidBeta?: number
}

const none: Pooling = { kind: 'none' }
const max7: Pooling = { kind: 'max', width: 7 }
const mean5: Pooling = { kind: 'mean', width: 5 }
const meanAttention: ScoreRule = { statistic: 'factored', attention: 'mean', value: 'none', aggregation: 'mean' }
const critical: ScoreRule = { statistic: 'factored', attention: 'mean', value: 'projected-l1', aggregation: 'mean' }

const presets: { readonly [N in PresetName]: Preset } = {
  laprox: { score: { statistic: 'joint' }, pooling: max7, scope: 'model' },
  'laprox-bound': { score: { statistic: 'bound' }, pooling: max7, scope: 'model' },
  'laprox-removal': { score: { statistic: 'removal' }, pooling: max7, scope: 'model' },
  snapkv: { score: meanAttention, pooling: mean5, scope: 'head' },
  pyramidkv: { score: meanAttention, pooling: mean5, scope: 'head', pyramidBeta: 20 },
  adakv: { score: meanAttention, pooling: mean5, scope: 'layer', floor: 0.2 },
  criticalkv: { score: critical, pooling: mean5, scope: 'head' },
  'critical-adakv': { score: critical, pooling: mean5, scope: 'layer', floor: 0.2 },
  vatp: {
    score: { statistic: 'factored', attention: 'sum', value: 'l1', aggregation: 'mean' },
    pooling: none,
    scope: 'head',
  },
  'kv-compress': {
    score: { statistic: 'factored', attention: 'l2', value: 'none', aggregation: 'rss' },
    pooling: max7,
    scope: 'model',
  },
  tova: {
    score: { statistic: 'factored', attention: 'last', value: 'none', aggregation: 'mean', sharing: 'layer' },
    pooling: none,
    scope: 'head',
    window: 1,
  },
  streaming: { score: { statistic: 'recency' }, pooling: none, scope: 'head' },
  knorm: { score: { statistic: 'key-norm' }, pooling: none, scope: 'head' },
  random: { score: { statistic: 'random', seed: 0 }, pooling: none, scope: 'head' },
}

/** The names of all presets. */
export const presetNames: readonly PresetName[] = Object.freeze(Object.keys(presets) as PresetName[])

/** Makes a policy of one kind. */
export type PolicyMaker<Options extends PolicyOptions = PolicyOptions> = (options: Options) => Policy

/** The type of {@link policies}: one maker per preset. */
export interface Policies {
  /** `laprox`: exact joint contributions, max-pool 7, ranked model-wide. The formula is derived from the abstract of Mai and Kim, arXiv 2605.07234. */
  readonly laprox: PolicyMaker
  /** `laprox-bound`: its upper bound, without the terms between heads. */
  readonly laproxBound: PolicyMaker
  /** `laprox-removal`: the exact change of the layer's output when an entry goes; beyond the paper, and the best rule in our measurements. */
  readonly laproxRemoval: PolicyMaker
  /** `snapkv`: mean attention over window and group, mean-pool 5, per head (SnapKV, Li et al., arXiv 2404.14469). */
  readonly snapkv: PolicyMaker
  /** `pyramidkv`: as snapkv, with budgets that fall from the first layer to the last, beta 20 (PyramidKV, Cai et al., arXiv 2406.02069). */
  readonly pyramidkv: PolicyMaker<PyramidOptions>
  /** `adakv`: as snapkv, the heads of a layer competing, floor .2 (Ada-KV, Feng et al., arXiv 2407.11550). */
  readonly adakv: PolicyMaker
  /** `criticalkv`: mean attention times the mean of ||v W_h||_1, in one stage, per head (CriticalKV, Feng et al., arXiv 2502.03805). */
  readonly criticalkv: PolicyMaker
  /** `critical-adakv`: as criticalkv, the heads of a layer competing, floor .2. */
  readonly criticalAdakv: PolicyMaker
  /** `vatp`: summed attention times ||v||_1, per head (VATP, Guo et al., arXiv 2406.12335). */
  readonly vatp: PolicyMaker
  /** `kv-compress`: ranks as the sum of squared attention over window and group, max-pool 7, model-wide (KV-Compress, Rehg, arXiv 2410.00161). */
  readonly kvCompress: PolicyMaker
  /** `tova`: the last query's attention, averaged over all heads of the layer, which share one ranking (TOVA, Oren et al., arXiv 2401.06104). */
  readonly tova: PolicyMaker
  /** `streaming`: sinks and the most recent tokens (StreamingLLM, Xiao et al., arXiv 2309.17453). */
  readonly streaming: PolicyMaker
  /** `knorm`: the smallest key norms, per head (Devoto et al., arXiv 2406.11430). */
  readonly knorm: PolicyMaker
  /** `random`: a uniform choice per head, as a baseline. */
  readonly random: PolicyMaker<RandomOptions>
}

/**
 * The presets. Each maker takes `{ keep }` and whatever of {@link PolicyOptions} should differ from the preset, and gives a
 * frozen policy; it throws LaproxError `INVALID_ARGUMENT` for options that cannot be. Where a peer has several published
 * variants, the one here serves a fair comparison: window 32 and 4 sinks for all but tova, statistics combined over the
 * group before pooling.
 *
 *     policies.laprox({ keep: 0.05 })
 *     policies.snapkv({ keep: { entries: 4096 }, pooling: { kind: 'max', width: 7 } })
 */
export const policies: Policies = Object.freeze({
  laprox: (options) => policy('laprox', options),
  laproxBound: (options) => policy('laprox-bound', options),
  laproxRemoval: (options) => policy('laprox-removal', options),
  snapkv: (options) => policy('snapkv', options),
  pyramidkv: (options) => policy('pyramidkv', options),
  adakv: (options) => policy('adakv', options),
  criticalkv: (options) => policy('criticalkv', options),
  criticalAdakv: (options) => policy('critical-adakv', options),
  vatp: (options) => policy('vatp', options),
  kvCompress: (options) => policy('kv-compress', options),
  tova: (options) => policy('tova', options),
  streaming: (options) => policy('streaming', options),
  knorm: (options) => policy('knorm', options),
  random: (options) => policy('random', options),
} satisfies Policies)

const optionNames = ['keep', 'window', 'sinks', 'recent', 'pooling', 'scope', 'floor', 'layerWeights', 'pinned', 'nonFinite']

/**
 * A policy by the name of its preset: for names from a command line or a configuration.
 *
 * @throws LaproxError `INVALID_ARGUMENT` for a name or an option that does not exist (with the closest match) or a value that cannot be
 */
export function policy(name: string, options: PolicyOptions & PyramidOptions & RandomOptions): Policy {
  if (!Object.hasOwn(presets, name)) {
    throw new LaproxError('INVALID_ARGUMENT', `${show(name)} is no preset; ${suggest(name, presetNames)}`)
  }
  const preset = presets[name as PresetName]
  const names = [...optionNames]
  if (preset.pyramidBeta !== undefined) names.push('pyramidBeta')
  if (preset.score.statistic === 'random') names.push('seed')
  const at = `options of ${name}`
  const given = fields(options, at, names)
  if (given.keep === undefined) throw wrong(`${at}: keep`, undefined, 'a ratio in (0, 1] or a budget')
  const seed = given.seed === undefined ? 0 : integer(given.seed, `${at}: seed`, 0, Number.MAX_SAFE_INTEGER)
  const window = or(given.window, preset.window ?? 32)
  const { layerWeights } = given
  const pyramidBeta = or(given.pyramidBeta, preset.pyramidBeta)
  return checked(
    {
      name,
      window,
      score: preset.score.statistic === 'random' ? { statistic: 'random', seed } : preset.score,
      ...(layerWeights === undefined ? {} : { layerWeights }),
      pooling: or(given.pooling, preset.pooling),
      scope: or(given.scope, preset.scope),
      budget: typeof given.keep === 'number' ? { ratio: given.keep } : given.keep,
      floor: or(given.floor, preset.floor ?? 0),
      ...(pyramidBeta === undefined ? {} : { pyramidBeta }),
      sinks: or(given.sinks, 4),
      recent: or(given.recent, window),
      pinned: or(given.pinned, []),
      nonFinite: or(given.nonFinite, 'error'),
    },
    at,
    'keep',
  )
}

/** An option or its default. Not `??`: null is no option's value. */
function or(value: unknown, standard: unknown): unknown {
  return value === undefined ? standard : value
}

/** Policies that were made or checked here: being frozen, they need no second look. */
const known = new WeakSet<object>()

/**
 * Checks what should be a policy, such as parsed JSON, and gives it back as a frozen one with its fields in a fixed order.
 * A policy that comes from here or from {@link policies} is given back as it is, at no cost.
 *
 * @throws LaproxError `INVALID_ARGUMENT`: names the field, its value and what was expected; for unknown fields and names, the closest match
 */
export function validatePolicy(value: unknown): Policy {
  if (typeof value === 'object' && value !== null && known.has(value)) return value as Policy
  return checked(value, 'policy', 'budget')
}

const policyFields = [
  'name',
  'window',
  'score',
  'layerWeights',
  'pooling',
  'scope',
  'budget',
  'floor',
  'pyramidBeta',
  'sinks',
  'recent',
  'pinned',
  'nonFinite',
]

function checked(value: unknown, at: string, budgetName: string): Policy {
  const from = fields(value, at, policyFields)
  if (typeof from.name !== 'string') throw wrong(`${at}: name`, from.name, 'a string')
  const scope = oneOf(from.scope, `${at}: scope`, ['model', 'layer', 'head'])
  const result: { -readonly [K in keyof Policy]: Policy[K] } = {
    name: from.name,
    window: integer(from.window, `${at}: window`, 1, 128),
    score: checkScore(from.score, `${at}: score`),
    pooling: checkPooling(from.pooling, `${at}: pooling`),
    scope,
    budget: checkBudget(from.budget, `${at}: ${budgetName}`),
    floor: number(from.floor, `${at}: floor`, 0, 1, 'a number from 0 to 1'),
    sinks: integer(from.sinks, `${at}: sinks`, 0, maxInt32),
    recent: integer(from.recent, `${at}: recent`, 0, maxInt32),
    pinned: checkPinned(from.pinned, `${at}: pinned`),
    nonFinite: oneOf(from.nonFinite, `${at}: nonFinite`, ['error', 'keep']),
  }
  if (from.layerWeights !== undefined) result.layerWeights = checkWeights(from.layerWeights, `${at}: layerWeights`)
  if (from.pyramidBeta !== undefined) result.pyramidBeta = checkBeta(from.pyramidBeta, `${at}: pyramidBeta`, scope)
  Object.freeze(result)
  known.add(result)
  return result
}

function checkScore(value: unknown, at: string): ScoreRule {
  const statistics = ['joint', 'bound', 'removal', 'factored', 'key-norm', 'recency', 'random'] as const
  const statistic = oneOf(fields(value, at).statistic, `${at}.statistic`, statistics)
  switch (statistic) {
    case 'factored': {
      const from = fields(value, at, ['statistic', 'attention', 'value', 'aggregation', 'sharing'])
      return Object.freeze({
        statistic,
        attention: oneOf(from.attention, `${at}.attention`, ['mean', 'sum', 'l2', 'max', 'last', 'none']),
        value: oneOf(from.value, `${at}.value`, ['none', 'l1', 'l2', 'projected-l1', 'projected-l2']),
        aggregation: oneOf(from.aggregation, `${at}.aggregation`, ['mean', 'sum', 'max', 'rss']),
        ...(from.sharing === undefined ? {} : { sharing: oneOf(from.sharing, `${at}.sharing`, ['group', 'layer']) }),
      })
    }
    case 'random': {
      const from = fields(value, at, ['statistic', 'seed'])
      return Object.freeze({ statistic, seed: integer(from.seed, `${at}.seed`, 0, Number.MAX_SAFE_INTEGER) })
    }
    default:
      fields(value, at, ['statistic'])
      return Object.freeze({ statistic })
  }
}

function checkPooling(value: unknown, at: string): Pooling {
  const kind = oneOf(fields(value, at).kind, `${at}.kind`, ['none', 'max', 'mean'])
  if (kind === 'none') {
    fields(value, at, ['kind'])
    return Object.freeze({ kind })
  }
  const { width } = fields(value, at, ['kind', 'width'])
  const expected = 'an odd integer from 1 to 255'
  if (number(width, `${at}.width`, 1, 255, expected) % 2 !== 1) throw wrong(`${at}.width`, width, expected)
  return Object.freeze({ kind, width: width as number })
}

function checkBudget(value: unknown, at: string): Budget {
  const expected = 'one of { ratio }, { entries } or { bytes }'
  if (typeof value !== 'object' || value === null) throw wrong(at, value, expected)
  const from = fields(value, at, ['ratio', 'entries', 'bytes'])
  const given = Object.keys(from).filter((key) => from[key] !== undefined)
  if (given.length !== 1) throw wrong(at, value, expected)
  if (from.ratio !== undefined) {
    const name = at.endsWith('keep') ? at : `${at}.ratio`
    const hint = typeof from.ratio === 'number' && from.ratio > 1 ? ` (for a count, use { entries: ${from.ratio} })` : ''
    const ratio = number(from.ratio, name, 0, 1, `a ratio in (0, 1]: the share that is kept${hint}`)
    if (ratio === 0) throw wrong(name, ratio, 'a ratio in (0, 1]: the share that is kept')
    return Object.freeze({ ratio })
  }
  if (from.entries !== undefined) return Object.freeze({ entries: integer(from.entries, `${at}.entries`, 0, Number.MAX_SAFE_INTEGER) })
  return Object.freeze({ bytes: integer(from.bytes, `${at}.bytes`, 0, Number.MAX_SAFE_INTEGER) })
}

function checkPinned(value: unknown, at: string): Policy['pinned'] {
  if (!Array.isArray(value)) throw wrong(at, value, 'an array of [begin, end)')
  const ranges = Array.from(value, (range: unknown, i) => {
    const expected = '[begin, end) with integers 0 <= begin <= end'
    if (!Array.isArray(range) || range.length !== 2) throw wrong(`${at}[${i}]`, range, expected)
    const [begin, end] = range as [unknown, unknown]
    if (!isInteger(begin, 0, maxInt32) || !isInteger(end, begin, maxInt32)) throw wrong(`${at}[${i}]`, range, expected)
    return Object.freeze([begin + 0, end + 0] as const)
  })
  return Object.freeze(ranges)
}

function checkWeights(value: unknown, at: string): readonly number[] {
  if (!Array.isArray(value)) throw wrong(at, value, 'an array with one finite number of at least 0 per layer')
  return Object.freeze(Array.from(value, (weight: unknown, i) => number(weight, `${at}[${i}]`, 0, 3.4e38, 'a finite float of at least 0')))
}

function checkBeta(value: unknown, at: string, scope: Scope): number {
  const expected = 'a number from 1 to 1e8, or 0 for even budgets'
  const beta = number(value, at, 0, 1e8, expected)
  if (beta > 0 && beta < 1) throw wrong(at, beta, expected)
  if (beta > 0 && scope !== 'head') throw wrong(at, beta, `scope head with it; scope is ${scope}`)
  return beta
}

/** The fields of a plain object, all of them known (where `names` says which there are). */
function fields(value: unknown, at: string, names?: readonly string[]): Readonly<Record<string, unknown>> {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw wrong(at, value, 'an object')
  if (names !== undefined) {
    for (const key of Object.keys(value)) {
      if (!names.includes(key)) throw new LaproxError('INVALID_ARGUMENT', `${at}: unknown field ${show(key)}; ${suggest(key, names)}`)
    }
  }
  return value as Readonly<Record<string, unknown>>
}

function oneOf<const Name extends string>(value: unknown, at: string, names: readonly Name[]): Name {
  if (names.includes(value as Name)) return value as Name
  if (value === undefined) throw wrong(at, value, `one of ${names.join(', ')}`)
  throw new LaproxError('INVALID_ARGUMENT', `${at} is ${show(value)}; ${suggest(value, names)}`)
}

function isInteger(value: unknown, least: number, most: number): value is number {
  return Number.isSafeInteger(value) && (value as number) >= least && (value as number) <= most
}

/** Adding 0 makes 0 of -0, which JSON does not know. */
function integer(value: unknown, at: string, least: number, most: number): number {
  if (isInteger(value, least, most)) return value + 0
  throw wrong(at, value, `an integer from ${least} to ${most}`)
}

function number(value: unknown, at: string, least: number, most: number, expected: string): number {
  if (typeof value === 'number' && value >= least && value <= most) return value + 0
  throw wrong(at, value, expected)
}
