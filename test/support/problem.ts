import { float64 } from '../oracle/arithmetic.js'
import { attention } from '../oracle/attention.js'
import { groupSize, type Layer, type Problem, rowPosition, type Segment } from '../oracle/problem.js'
import { type FloatType, roundTo } from './half.js'
import type { Random } from './random.js'

/** What is asked of a generated problem; everything else is drawn. */
export interface Shape {
  readonly layers: number
  readonly sequences: number
  readonly kvHeads: number
  readonly groupSize: number
  readonly headDim: number
  readonly modelDim: number
  readonly rows: number
  readonly type: FloatType
  /** [L * S * G] tokens of each segment. */
  readonly lengths: readonly number[]
  /** Whether the cache has been thinned before: ascending positions with gaps, and context lengths beyond them. */
  readonly positions: boolean
  /** Standard deviation of the logits: 0.5 is diffuse, 5 is peaked. */
  readonly spread: number
  /** 0 to 1: how much of a head's queries is common to all rows of the window. Default 0. */
  readonly coherence?: number
  readonly scale?: number
  /** [L]. */
  readonly softCaps?: readonly number[]
  /** [L]. */
  readonly slidingWindows?: readonly number[]
  /** [L]. */
  readonly hasSinkLogits?: readonly boolean[]
  /** The engine's log-sum-exp as it hands it over: float32, to this base. */
  readonly givenBase?: 'e' | '2'
}

/** Group sizes of models: odd ones too. */
export const GROUP_SIZES = [1, 2, 3, 4, 7, 8, 16] as const

/** A shape small enough for the oracle, with everything that a layer may have switched on now and then. */
export function drawShape(random: Random, fixed: Partial<Shape> = {}): Shape {
  const layers = fixed.layers ?? random.integer(1, 3)
  const sequences = fixed.sequences ?? random.integer(1, 3)
  const group = fixed.groupSize ?? random.pick(GROUP_SIZES)
  const kvHeads = fixed.kvHeads ?? random.integer(1, group >= 7 ? 2 : 3)
  const headDim = fixed.headDim ?? 8 * random.pick([1, 1, 2, 2, 3, 4, 5, 8, 12, 16])
  const perLayer = <T>(draw: () => T): T[] => Array.from({ length: layers }, draw)
  return {
    layers,
    sequences,
    kvHeads,
    groupSize: group,
    headDim,
    modelDim: random.pick([8, 20, 33, 48, 64]),
    rows: random.pick([1, 2, 3, 5, 8, 16, 31, 32]),
    type: random.pick(['float32', 'float16', 'bfloat16']),
    lengths: sharedLengths(random, layers, sequences, kvHeads, group >= 7 ? 30 : 50),
    positions: false,
    spread: random.pick([0.3, 1, 3, 6]),
    ...(random.chance(0.3) ? { scale: random.pick([0.05, 0.2, 0.7]) } : {}),
    ...(random.chance(0.4) ? { softCaps: perLayer(() => random.pick([0, 2, 20, 50])) } : {}),
    ...(random.chance(0.4) ? { slidingWindows: perLayer(() => random.pick([0, 1, 7, 30, 1000])) } : {}),
    ...(random.chance(0.4) ? { hasSinkLogits: perLayer(() => random.chance(0.6)) } : {}),
    ...(random.chance(0.3) ? { givenBase: random.pick(['e', '2'] as const) } : {}),
    ...fixed,
  }
}

/** Lengths that the KV heads of a layer share, short and empty ones among them. */
export function sharedLengths(random: Random, layers: number, sequences: number, kvHeads: number, most: number): number[] {
  return Array.from({ length: layers * sequences }, () => drawLength(random, most)).flatMap((n) => Array<number>(kvHeads).fill(n))
}

/** Lengths of which every segment has its own. */
export function ownLengths(random: Random, layers: number, sequences: number, kvHeads: number, most: number): number[] {
  return Array.from({ length: layers * sequences * kvHeads }, () => drawLength(random, most))
}

function drawLength(random: Random, most: number): number {
  return random.chance(0.1) ? 0 : random.chance(0.2) ? random.integer(1, 8) : random.integer(1, most)
}

export function makeProblem(random: Random, shape: Shape): Problem {
  const queryHeads = shape.kvHeads * shape.groupSize
  const { sequences, kvHeads, headDim, modelDim, rows } = shape
  const contextLengths = Array.from({ length: sequences }, (_, sequence) => {
    const longest = Math.max(...shape.lengths.filter((_, x) => Math.floor(x / kvHeads) % sequences === sequence))
    return longest + random.integer(0, longest)
  })
  const scale = Math.fround(shape.scale ?? 1 / Math.sqrt(headDim))
  // Logits are scale * sum over d of q * k.
  const size = Math.sqrt(shape.spread / (scale * Math.sqrt(headDim)))
  const normals = (count: number, deviation: number): Float64Array =>
    Float64Array.from({ length: count }, () => roundTo(shape.type, deviation * random.normal()))

  const layers = Array.from({ length: shape.layers }, (_, l): Layer => {
    const segments = Array.from({ length: sequences * kvHeads }, (_, at): Segment => {
      const length = shape.lengths[l * sequences * kvHeads + at]!
      const contextLength = shape.positions ? contextLengths[Math.floor(at / kvHeads)]! : length
      const positions = Int32Array.from(shape.positions ? random.subset(contextLength, length) : Array(length).keys())
      return { length, keys: normals(length * headDim, size), values: normals(length * headDim, 1), positions, contextLength }
    })
    return {
      // Heads of unequal weight, so that cross terms and aggregations differ.
      projection: normals(queryHeads * headDim * modelDim, (0.3 + random.next()) / Math.sqrt(headDim)),
      scale,
      softCap: shape.softCaps?.[l] ?? 0,
      slidingWindow: shape.slidingWindows?.[l] ?? 0,
      sinkLogits: shape.hasSinkLogits?.[l] ? Float64Array.from({ length: queryHeads }, () => Math.fround(2 * random.normal())) : undefined,
      queries: Array.from({ length: sequences }, () => drawQueries(random, shape, queryHeads, size)),
      logSumExp: undefined,
      segments,
    }
  })
  const problem: Problem = { layers, sequences, queryHeads, kvHeads, headDim, modelDim, rows }
  blankMissingRows(problem)
  return shape.givenBase === undefined ? problem : withLogSumExp(problem, shape.givenBase)
}

function drawQueries(random: Random, shape: Shape, queryHeads: number, size: number): Float64Array {
  const { rows, headDim, coherence = 0 } = shape
  const common = Float64Array.from({ length: queryHeads * headDim }, () => random.normal())
  return Float64Array.from({ length: queryHeads * rows * headDim }, (_, at) => {
    const shared = common[Math.floor(at / rows / headDim) * headDim + (at % headDim)]!
    return roundTo(shape.type, size * (Math.sqrt(coherence) * shared + Math.sqrt(1 - coherence) * random.normal()))
  })
}

/** Rows that do not exist hold NaN: nothing may read them. */
function blankMissingRows(problem: Problem): void {
  const { headDim, rows } = problem
  for (const layer of problem.layers) {
    for (const [sequence, queries] of layer.queries.entries()) {
      for (let h = 0; h < problem.queryHeads; h++) {
        const segment = layer.segments[sequence * problem.kvHeads + Math.floor(h / groupSize(problem))]!
        for (let q = 0; q < rows; q++) {
          if (rowPosition(problem, segment, q) < 0) queries.fill(Number.NaN, (h * rows + q) * headDim, (h * rows + q + 1) * headDim)
        }
      }
    }
  }
}

/** The same problem with some of a layer's segments changed, [layer, sequence * G + head]. */
export function changeSegments(
  problem: Problem,
  places: readonly (readonly [layer: number, segment: number])[],
  change: (segment: Segment) => Partial<Segment>,
): Problem {
  const layers = problem.layers.map(
    (layer, l): Layer => ({
      ...layer,
      segments: layer.segments.map((segment, x) =>
        places.some(([at, which]) => at === l && which === x) ? { ...segment, ...change(segment) } : segment,
      ),
    }),
  )
  return { ...problem, layers }
}

/** The same problem with the log-sum-exp of every row given, as float32 to `base`. */
export function withLogSumExp(problem: Problem, base: 'e' | '2'): Problem {
  const unit = base === '2' ? Math.LN2 : 1
  const layers = problem.layers.map((layer): Layer => {
    const logSumExp = Array.from({ length: problem.sequences }, (_, sequence) => {
      const rows = Array.from({ length: problem.queryHeads }, (_, h) => attention(float64, problem, layer, sequence, h).logSumExp)
      return Float64Array.from(
        rows.flatMap((row) => [...row]),
        (lse) => Math.fround(lse / unit) * unit,
      )
    })
    return { ...layer, logSumExp }
  })
  return { ...problem, layers }
}
