import type { LayerShape } from '#lib/cli/synthetic'
import { Graph } from './onnx.js'

/**
 * The joint score of a layer as an ONNX graph, straight from the formula over the pairs (r, s) of a group's query heads:
 * score = sqrt(sum over r, s of <a_r, a_s> * (v M_rs v^T)), M_rs = W_r W_s^T. Of two pairs that are equal one is computed.
 *
 * Inputs: queries [G, R * m, d], keys and values [G, n, d], gram [G, R * d, R * d] with all M_rs, mask [m, n] added to the logits.
 * Output: score [G, n].
 */
export function gramScoreGraph({ kvHeads, queryHeads, headDim, window, tokens }: LayerShape): Uint8Array {
  const group = queryHeads / kvHeads
  const graph = new Graph()
  const queries = graph.input('queries', [kvHeads, group * window, headDim])
  const keys = graph.input('keys', [kvHeads, tokens, headDim])
  const values = graph.input('values', [kvHeads, tokens, headDim])
  const gram = graph.input('gram', [kvHeads, group * headDim, group * headDim])
  const mask = graph.input('mask', [window, tokens])

  const scaled = graph.add('Mul', [queries, graph.scalar(1 / Math.sqrt(headDim))])
  const products = graph.add('MatMul', [scaled, graph.add('Transpose', [keys], { perm: [0, 2, 1] })])
  const logits = graph.add('Reshape', [products, graph.indices(kvHeads, group, window, tokens)])
  const attention = graph.split(graph.add('Softmax', [graph.add('Add', [logits, mask])], { axis: -1 }), 1, group)

  const terms: string[] = []
  for (let r = 0; r < group; r++) {
    for (let s = r; s < group; s++) {
      const shared = graph.add('Mul', [attention[r]!, attention[s]!])
      const attentionTerm = graph.add('ReduceSum', [shared, graph.indices(1, 2)], { keepdims: 0 })
      const [begin, end] = [graph.indices(r * headDim, s * headDim), graph.indices((r + 1) * headDim, (s + 1) * headDim)]
      const projected = graph.add('MatMul', [values, graph.add('Slice', [gram, begin, end, graph.indices(1, 2)])])
      const valueTerm = graph.add('ReduceSum', [graph.add('Mul', [projected, values]), graph.indices(2)], { keepdims: 0 })
      const term = graph.add('Mul', [attentionTerm, valueTerm])
      terms.push(r === s ? term : graph.add('Mul', [term, graph.scalar(2)]))
    }
  }
  graph.output('score', [kvHeads, tokens], graph.add('Sqrt', [graph.add('Relu', [graph.add('Sum', terms)])]))
  return graph.encode()
}

/** Input: projection [D, G, R * d]. Output: gram [G, R * d, R * d], the products of all rows of a group's W_h. */
export function gramMatrixGraph({ kvHeads, queryHeads, headDim, modelDim }: LayerShape): Uint8Array {
  const rows = (queryHeads / kvHeads) * headDim
  const graph = new Graph()
  const projection = graph.input('projection', [modelDim, kvHeads, rows])
  const left = graph.add('Transpose', [projection], { perm: [1, 2, 0] })
  const right = graph.add('Transpose', [projection], { perm: [1, 0, 2] })
  graph.output('gram', [kvHeads, rows, rows], graph.add('MatMul', [left, right]))
  return graph.encode()
}
