import { type FloatType, type Tensor as LaproxTensor, toFloat32 } from 'laprox'
import { InferenceSession, Tensor } from 'onnxruntime-node'
import type { Layer, LayerShape } from '#lib/cli/synthetic'
import { gramMatrixGraph, gramScoreGraph } from './gram-graph.js'

/** The Gram formula on a layer in ONNX Runtime, whose CPU provider takes it in float32. */
export class GramSession {
  private constructor(
    private readonly session: InferenceSession,
    private readonly feeds: Readonly<Record<string, Tensor>>,
  ) {}

  /** Loads the graph and a layer's tensors; the matrices M_rs are computed here, once, as laprox computes its factors once. */
  static async open(shape: LayerShape, layer: Layer, threads: number): Promise<GramSession> {
    const { kvHeads, queryHeads, headDim, modelDim, window, tokens } = shape
    const rows = queryHeads / kvHeads
    const options = { intraOpNumThreads: threads, interOpNumThreads: 1 }

    const matrices = await InferenceSession.create(gramMatrixGraph(shape), options)
    const { gram } = await matrices.run({ projection: float32(layer.projection, [modelDim, kvHeads, rows * headDim]) })
    await matrices.release()

    return new GramSession(await InferenceSession.create(gramScoreGraph(shape), options), {
      gram: gram!,
      queries: float32(layer.queries, [kvHeads, rows * window, headDim]),
      keys: float32(layer.keys, [kvHeads, tokens, headDim]),
      values: float32(layer.values, [kvHeads, tokens, headDim]),
      mask: causalMask(shape),
    })
  }

  /** The scores [kvHeads * tokens]. */
  async run(): Promise<Float32Array> {
    const { score } = await this.session.run(this.feeds)
    return score!.data as Float32Array
  }
}

function float32(tensor: LaproxTensor<FloatType>, dims: readonly number[]): Tensor {
  return new Tensor('float32', toFloat32(tensor), dims)
}

/** [window, tokens]: -inf where a query does not see a token. */
function causalMask({ window, tokens }: LayerShape): Tensor {
  const mask = new Float32Array(window * tokens)
  for (let row = 0; row < window; row++) mask.fill(Number.NEGATIVE_INFINITY, row * tokens + tokens - window + row + 1, (row + 1) * tokens)
  return new Tensor('float32', mask, [window, tokens])
}
