import { type FloatType, fromFloat32, type Tensor } from '../tensor.js'
import { Random } from './random.js'

/** The sizes of an attention layer and of what it is scored on. */
export interface LayerShape {
  readonly queryHeads: number
  readonly kvHeads: number
  readonly headDim: number
  readonly modelDim: number
  /** Rows of the observation window. */
  readonly window: number
  /** Cached tokens. */
  readonly tokens: number
}

/** The tensors of an attention layer and of its cache. */
export interface Layer {
  /** [queryHeads, window, headDim] */
  readonly queries: Tensor<FloatType>
  /** [kvHeads, tokens, headDim] */
  readonly keys: Tensor<FloatType>
  readonly values: Tensor<FloatType>
  /** [modelDim, queryHeads * headDim] */
  readonly projection: Tensor<FloatType>
}

// Keys carry heavy-tailed features that drift along the text. A query looks for a mixture of them: what its whole group looks
// for, what its head does, and what it alone does. These are the lengths of the three.
const FEATURES = 16
const GROUP = 1.7
const HEAD = 1.35
const ROW = 1.1
/** How sharply the heads of a group look: uniform between these. */
const SHARPNESS = [0.6, 1.4] as const
/** How much of a feature stays from one token to the next. */
const DRIFT = 0.85
/** Deviation of the logits that come from no feature. */
const NOISE = 0.7
/** Logits by which the last token stands out, at most; those before it do by e less every so many tokens. */
const RECENCY = [5, 16] as const
/** Deviations of the logarithm of value norms between KV heads, and of value norms within one. */
const LOUDNESS = [0.4, 0.15] as const
/** The smallest scale of an output projection's rows, the largest being 1. */
const FLATTEST = 0.3

/**
 * A layer whose attention has the statistics of a trained model's, needle-lm's: few tokens of each head matter, those
 * that do stand close together, and heads of a group look for similar things. `npm run bench -- --only evict` shows how close.
 */
export function generateLayer(shape: LayerShape, seed = 1, type: FloatType = 'bfloat16'): Layer {
  const random = new Random(seed)
  const { queryHeads, kvHeads, headDim, modelDim, window, tokens } = shape
  const group = queryHeads / kvHeads
  const queries = new Float32Array(queryHeads * window * headDim)
  const keys = new Float32Array(kvHeads * tokens * headDim)
  const values = new Float32Array(kvHeads * tokens * headDim)
  for (let head = 0; head < kvHeads; head++) {
    writeQueries(queries.subarray(head * group * window * headDim), group, shape, random)
    writeKeys(keys.subarray(head * tokens * headDim), shape, random)
    writeValues(values.subarray(head * tokens * headDim), shape, random)
  }
  return {
    queries: fromFloat32(type, queries, [queryHeads, window, headDim]),
    keys: fromFloat32(type, keys, [kvHeads, tokens, headDim]),
    values: fromFloat32(type, values, [kvHeads, tokens, headDim]),
    projection: fromFloat32(type, projection(shape, random), [modelDim, queryHeads * headDim]),
  }
}

/** The scale of keys and queries in the dimensions that carry noise alone. */
function quiet(headDim: number): number {
  return Math.sqrt(NOISE) / (1 - (FEATURES + 1) / headDim) ** 0.25
}

function writeQueries(to: Float32Array, group: number, { headDim, window }: LayerShape, random: Random): void {
  const scale = Math.sqrt(headDim)
  const sharpness = between(SHARPNESS, random)
  const shared = direction(GROUP, random)
  for (let h = 0; h < group; h++) {
    const own = direction(HEAD, random)
    const recency = RECENCY[0] * random.uniform()
    for (let row = 0; row < window; row++) {
      const first = (h * window + row) * headDim
      direction(ROW, random).forEach((alone, f) => {
        to[first + f] = scale * sharpness * (shared[f]! + own[f]! + alone)
      })
      to[first + FEATURES] = scale * recency
      for (let i = FEATURES + 1; i < headDim; i++) to[first + i] = quiet(headDim) * random.noise()
    }
  }
}

function writeKeys(to: Float32Array, { headDim, tokens }: LayerShape, random: Random): void {
  const noise = quiet(headDim)
  const news = Math.sqrt(1 - DRIFT * DRIFT)
  const features = new Float32Array(FEATURES)
  for (let token = 0; token < tokens; token++) {
    const first = token * headDim
    for (let f = 0; f < FEATURES; f++) {
      // The product of two normals: variance 1, heavy tails.
      features[f] = DRIFT * features[f]! + news * random.normal() * random.normal()
      to[first + f] = features[f]!
    }
    to[first + FEATURES] = Math.exp((token + 1 - tokens) / RECENCY[1])
    for (let i = FEATURES + 1; i < headDim; i++) to[first + i] = noise * random.noise()
  }
}

function writeValues(to: Float32Array, { headDim, tokens }: LayerShape, random: Random): void {
  const loudness = Math.exp(LOUDNESS[0] * random.normal())
  for (let token = 0; token < tokens; token++) {
    const norm = loudness * (1 + LOUDNESS[1] * random.noise())
    for (let i = 0; i < headDim; i++) to[token * headDim + i] = norm * random.noise()
  }
}

/** [modelDim, queryHeads * headDim], with singular values of a head's slice that fall from 1. */
function projection({ modelDim, queryHeads, headDim }: LayerShape, random: Random): Float32Array {
  const spread = (1 - FLATTEST) / (headDim - 1)
  return new Float32Array(modelDim * queryHeads * headDim).map((_, i) => {
    return (random.noise() / Math.sqrt(modelDim)) * (FLATTEST + spread * (i % headDim))
  })
}

function between([low, high]: readonly [number, number], random: Random): number {
  return low + (high - low) * random.uniform()
}

/** A random mixture of features of an expected length. */
function direction(length: number, random: Random): Float32Array {
  return new Float32Array(FEATURES).map(() => (length / Math.sqrt(FEATURES)) * random.normal())
}
