import { InferenceSession, Tensor } from 'onnxruntime-node'
import { Graph } from '../../bench/onnx.js'
import { Random } from './random.js'

export const layers = 2
export const kvHeads = 2
export const headDim = 8
const vocabulary = 16
const positions = 64

/** Of each layer, what a token adds to keys, values and queries, and its position to keys and queries: [rows, G * d]. */
interface Weights {
  readonly key: Float32Array
  readonly value: Float32Array
  readonly query: Float32Array
  readonly position: Float32Array
}

const random = new Random(3)
const table = (rows: number): Float32Array => Float32Array.from({ length: rows * kvHeads * headDim }, () => random.next() * 2 - 1)
export const weights: readonly Weights[] = Array.from({ length: layers }, () => ({
  key: table(vocabulary),
  value: table(vocabulary),
  query: table(vocabulary),
  position: table(positions),
}))

/**
 * A made-up decoder that takes and gives what models exported by optimum do: `input_ids`, `attention_mask`, `position_ids` and
 * `past_key_values.<l>.key`, `.value` in, `present.<l>.key`, `.value` out. Its layers do not follow each other: each attends, with
 * the position added to its keys and queries, and its output is `attended.<l>` [S, G, T, d]; its queries are `query.<l>`. New tokens
 * see each other, as nobody reads more than one.
 */
export function openExportedModel(): Promise<InferenceSession> {
  const graph = new Graph()
  const ids = graph.input('input_ids', ['S', 'T'], 'int64')
  const mask = graph.input('attention_mask', ['S', 'P+T'], 'int64')
  const places = graph.input('position_ids', ['S', 'T'], 'int64')
  const unseen = graph.add('Mul', [graph.add('Sub', [graph.add('Cast', [mask], { to: 1 }), graph.scalar(1)]), graph.scalar(1e9)])
  const bias = graph.add('Unsqueeze', [unseen, graph.indices(1, 2)])
  for (const [l, { key, value, query, position }] of weights.entries()) {
    const look = (rows: number, data: Float32Array, at: string): string => {
      const found = graph.add('Gather', [graph.weights([rows, kvHeads, headDim], data), at], { axis: 0 })
      return graph.add('Transpose', [found], { perm: [0, 2, 1, 3] })
    }
    const place = look(positions, position, places)
    const past = ['key', 'value'].map((kind) => graph.input(`past_key_values.${l}.${kind}`, ['S', kvHeads, 'P', headDim]))
    const fresh = [graph.add('Add', [look(vocabulary, key, ids), place]), look(vocabulary, value, ids)]
    const [keys, values] = [0, 1].map((i) => graph.add('Concat', [past[i]!, fresh[i]!], { axis: 2 }))
    const queries = graph.add('Add', [look(vocabulary, query, ids), place])
    const logits = graph.add('MatMul', [queries, graph.add('Transpose', [keys!], { perm: [0, 1, 3, 2] })])
    const scaled = graph.add('Mul', [logits, graph.scalar(1 / Math.sqrt(headDim))])
    const attention = graph.add('Softmax', [graph.add('Add', [scaled, bias])], { axis: -1 })
    graph.output(`attended.${l}`, ['S', kvHeads, 'T', headDim], graph.add('MatMul', [attention, values!]))
    graph.output(`query.${l}`, ['S', kvHeads, 'T', headDim], queries)
    graph.output(`present.${l}.key`, ['S', kvHeads, 'P+T', headDim], keys!)
    graph.output(`present.${l}.value`, ['S', kvHeads, 'P+T', headDim], values!)
  }
  return InferenceSession.create(graph.encode(), { intraOpNumThreads: 1 })
}

/** What the model takes to begin with: rows of tokens, -1 where a sequence is padded. */
export function prompt(rows: readonly (readonly number[])[]): Record<string, Tensor> {
  const [sequences, tokens] = [rows.length, rows[0]!.length]
  const integers = (values: readonly number[]): Tensor => new Tensor('int64', BigInt64Array.from(values, BigInt), [sequences, tokens])
  const places = rows.map((row) => row.map((_, i) => Math.max(row.slice(0, i + 1).filter((token) => token >= 0).length - 1, 0)))
  const none = (): Tensor => new Tensor('float32', new Float32Array(0), [sequences, kvHeads, 0, headDim])
  return {
    input_ids: integers(rows.flat().map((token) => Math.max(token, 0))),
    attention_mask: integers(rows.flat().map((token) => Number(token >= 0))),
    position_ids: integers(places.flat()),
    ...Object.fromEntries(Array.from({ length: layers }, (_, l) => ['key', 'value'].map((kind) => [`past_key_values.${l}.${kind}`, none()])).flat()),
  }
}

/** What one token attends to, in float64: the tokens that a head keeps, by token and position, and itself. */
export function attended(
  layer: number,
  head: number,
  token: number,
  position: number,
  kept: readonly { token: number; position: number }[],
): number[] {
  const { key, value, query, position: place } = weights[layer]!
  const row = (from: Float32Array, index: number): number[] =>
    Array.from({ length: headDim }, (_, i) => from[(index * kvHeads + head) * headDim + i]!)
  const add = (a: number[], b: number[]): number[] => a.map((x, i) => x + b[i]!)
  const own = add(row(query, token), row(place, position))
  const seen = [...kept, { token, position }]
  const logits = seen.map(
    (one) => add(row(key, one.token), row(place, one.position)).reduce((sum, x, i) => sum + x * own[i]!, 0) / Math.sqrt(headDim),
  )
  const exponentials = logits.map((logit) => Math.exp(logit - Math.max(...logits)))
  const total = exponentials.reduce((sum, x) => sum + x, 0)
  return Array.from({ length: headDim }, (_, i) => seen.reduce((sum, one, j) => sum + (exponentials[j]! / total) * row(value, one.token)[i]!, 0))
}
