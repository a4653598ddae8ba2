import { AttentionModel, type Device, type FloatType, type Policy, type Scores, type Selection, score, Tensor, toFloat32 } from 'laprox'
import type { Layer } from '#lib/cli/synthetic'
import { describeCache } from './layer.js'

/**
 * The share of entries, those that are protected left out, whose upper bound from exact attention norms,
 * ||v|| * sum over the group of s_h ||a_h||, reaches the smallest pooled score that was kept. s_h is the largest singular value of W_h.
 */
export async function shareAboveThreshold(
  device: Device,
  layers: readonly Layer[],
  policy: Policy,
  scores: Scores,
  selection: Selection,
): Promise<number> {
  const bounds = await boundsFromExactNorms(device, layers)
  const threshold = smallestKept(scores, selection, policy)
  let above = 0
  scores.lengths.forEach((length, segment) => {
    const first = scores.offsets[segment]!
    for (const bound of bounds.subarray(first + policy.sinks, first + length - policy.recent)) above += Number(bound >= threshold)
  })
  return above / bounds.length
}

/** The smallest pooled score that a selection of one sequence kept on its merit. */
function smallestKept(scores: Scores, selection: Selection, { pooling, sinks, recent }: Policy): number {
  const reach = pooling.kind === 'none' ? 0 : (pooling.width - 1) / 2
  let smallest = Number.POSITIVE_INFINITY
  for (let layer = 0; layer < scores.layers; layer++) {
    for (let head = 0; head < scores.kvHeads; head++) {
      const segment = scores.segment(layer, 0, head)
      for (const token of selection.kept(layer, 0, head)) {
        if (token < sinks || token >= segment.length - recent) continue
        let pooled = 0
        const end = Math.min(segment.length, token + reach + 1)
        for (let t = Math.max(0, token - reach); t < end; t++) pooled = Math.max(pooled, segment[t]!)
        smallest = Math.min(smallest, pooled)
      }
    }
  }
  return smallest
}

/** One bound an entry, laid out as scores are. */
async function boundsFromExactNorms(device: Device, layers: readonly Layer[]): Promise<Float32Array> {
  const [queryHeads, window, headDim] = layers[0]!.queries.dims as [number, number, number]
  const kvHeads = layers[0]!.keys.dims[0]!
  const group = queryHeads / kvHeads
  using cache = describeCache(device, layers)
  // ||a_h|| comes from laprox itself: a model of one query head a group, each member of the groups in turn.
  using model = AttentionModel.create(device, { layers: layers.length, queryHeads: kvHeads, kvHeads, headDim })
  const singular = layers.map(({ projection }) => largestSingularValues(projection, queryHeads))

  const bounds = new Float32Array(cache.entries)
  for (let member = 0; member < group; member++) {
    const queries = layers.map(({ queries: { type, data, offset } }) => {
      const strides = [group * window * headDim, headDim, 1]
      return new Tensor(type, data, [kvHeads, window, headDim], { strides, offset: offset + member * window * headDim })
    })
    const norms = await score(model, cache, { queries }, norm('attention', window))
    singular.forEach((values, layer) => {
      for (let head = 0; head < kvHeads; head++) {
        const first = norms.offsets[layer * kvHeads + head]!
        const s = values[head * group + member]!
        norms.segment(layer, 0, head).forEach((value, token) => {
          bounds[first + token]! += s * value
        })
      }
    })
  }
  const values = await score(model, cache, null, norm('value', window))
  return bounds.map((bound, i) => bound * values.data[i]!)
}

/** A policy whose scores are ||a_h|| of a single query head, or ||v||. */
function norm(of: 'attention' | 'value', window: number): Policy {
  const [attention, value] = of === 'attention' ? (['l2', 'none'] as const) : (['none', 'l2'] as const)
  return {
    name: `norm of ${of}`,
    window,
    score: { statistic: 'factored', attention, value, aggregation: 'max' },
    pooling: { kind: 'none' },
    scope: 'model',
    budget: { ratio: 1 },
    floor: 0,
    sinks: 0,
    recent: 0,
    pinned: [],
    nonFinite: 'error',
  }
}

/** Of the slices W_h of an output projection [D, H * d], by power iteration. */
function largestSingularValues(projection: Tensor<FloatType>, heads: number): number[] {
  const [modelDim, width] = projection.dims as [number, number]
  const weights = toFloat32(projection)
  const headDim = width / heads
  return Array.from({ length: heads }, (_, head) => {
    let x = new Float64Array(headDim).fill(1)
    let largest = 0
    for (let step = 0; step < 16; step++) {
      const next = new Float64Array(headDim)
      for (let column = 0; column < modelDim; column++) {
        const first = column * width + head * headDim
        let y = 0
        for (let i = 0; i < headDim; i++) y += weights[first + i]! * x[i]!
        for (let i = 0; i < headDim; i++) next[i]! += weights[first + i]! * y
      }
      const length = Math.hypot(...next)
      largest = Math.sqrt(length / Math.hypot(...x))
      x = next.map((value) => value / length)
    }
    return largest
  })
}
