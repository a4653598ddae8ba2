import { generateLayer } from '../../lib/cli/synthetic.js'
import { type FloatType, fromFloat32, type Tensor, toFloat32 } from '../../lib/index.js'

/** What is asked of a generated capture. */
export interface CaptureShape {
  readonly layers?: number
  readonly queryHeads?: number
  readonly kvHeads?: number
  readonly headDim?: number
  readonly tokens?: number
  /** Rows of the window. */
  readonly rows?: number
  /** Rows of later queries. */
  readonly later?: number
  readonly type?: FloatType
}

/** The tensors of a capture by name; its attention is like a trained model's. */
export function captureTensors(shape: CaptureShape = {}): Map<string, Tensor> {
  const { layers = 2, queryHeads = 4, kvHeads = 2, headDim = 24, tokens = 300, rows = 32, later = 0, type = 'float32' } = shape
  const tensors = new Map<string, Tensor>()
  for (let layer = 0; layer < layers; layer++) {
    const window = rows + later
    const generated = generateLayer({ queryHeads, kvHeads, headDim, modelDim: 40, window, tokens }, layer + 1, type)
    const queries = toFloat32(generated.queries)
    const slice = (begin: number, end: number): Tensor => {
      const heads = Array.from({ length: queryHeads }, (_, h) => queries.subarray((h * window + begin) * headDim, (h * window + end) * headDim))
      return fromFloat32(type, Float32Array.from(heads.flatMap((head) => [...head])), [queryHeads, end - begin, headDim])
    }
    tensors.set(`layers.${layer}.keys`, generated.keys)
    tensors.set(`layers.${layer}.values`, generated.values)
    tensors.set(`layers.${layer}.queries`, slice(0, rows))
    tensors.set(`layers.${layer}.output_projection`, generated.projection)
    if (later > 0) tensors.set(`layers.${layer}.later_queries`, slice(rows, window))
  }
  return tensors
}

/** The metadata that every capture has. */
export const captureMetadata: Readonly<Record<string, string>> = { 'laprox.capture': '1' }
