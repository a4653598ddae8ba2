import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { InferenceSession, Tensor } from 'onnxruntime-node'
import { Past } from './past.js'
import { appendRows, floats, lastRows } from './rows.js'

/** The sizes of a decoder, from its config.json. */
export interface Shape {
  readonly layers: number
  readonly queryHeads: number
  readonly kvHeads: number
  readonly headDim: number
}

/** What a model says of the tokens it has just read. */
export interface Reading {
  /** [tokens, vocabulary] */
  readonly logits: Tensor
  /** A layer each: queries [queryHeads, tokens, headDim], keys and values [kvHeads, tokens, headDim]; queries and keys rotated. */
  readonly queries: readonly Tensor[]
  readonly keys: readonly Tensor[]
  readonly values: readonly Tensor[]
}

/** A prompt that was read to its end. */
export interface Prefill {
  readonly past: Past
  /** The logits that follow the prompt's last token, [vocabulary]. */
  readonly logits: Float32Array
  /** The observation window: queries of the prompt's last tokens, a layer each, [queryHeads, window, headDim]. */
  readonly queries: readonly Tensor[]
}

/** A prompt is read in pieces of this many tokens. */
const CHUNK = 512

/** A decoder in ONNX Runtime. Its graph reads new tokens after any past: the whole one, or what an eviction left of it. */
export class LanguageModel {
  private constructor(
    readonly shape: Shape,
    private readonly session: InferenceSession,
  ) {}

  /** Opens config.json and extend.onnx (its weights are in model.safetensors) of a folder. */
  static async load(folder: string): Promise<LanguageModel> {
    const config = JSON.parse(await readFile(join(folder, 'config.json'), 'utf8'))
    const shape = {
      layers: config.num_hidden_layers,
      queryHeads: config.num_attention_heads,
      kvHeads: config.num_key_value_heads ?? config.num_attention_heads,
      headDim: config.head_dim ?? config.hidden_size / config.num_attention_heads,
    }
    // Its threads would go on spinning after each run, on the very cores that laprox needs next.
    const extra = { session: { intra_op: { allow_spinning: '0' } } }
    return new LanguageModel(shape, await InferenceSession.create(join(folder, 'extend.onnx'), { extra }))
  }

  /** Reads `tokens`, the first of which stands at `position`, after `past`. */
  async extend(past: Past, tokens: ArrayLike<number>, position: number): Promise<Reading> {
    const feeds: Record<string, Tensor> = { ids: integers(tokens), position: integers([position]) }
    past.layers.forEach((layer, l) => {
      feeds[`past_key.${l}`] = layer.key
      feeds[`past_value.${l}`] = layer.value
      feeds[`past_mask.${l}`] = layer.mask
    })
    const outputs = await this.session.run(feeds)
    const each = (name: string) => past.layers.map((_, l) => outputs[`${name}.${l}`]!)
    return { logits: outputs.logits!, queries: each('query'), keys: each('key'), values: each('value') }
  }

  /** Reads a whole prompt and keeps the queries of its last `window` tokens, which may come from more than one piece. */
  async prefill(prompt: Int32Array, window: number, progress: (done: number) => void = () => {}): Promise<Prefill> {
    let past = Past.empty(this.shape)
    let queries: Tensor[] = []
    let logits: Float32Array = new Float32Array(0)
    for (let begin = 0; begin < prompt.length; begin += CHUNK) {
      const reading = await this.extend(past, prompt.subarray(begin, begin + CHUNK), begin)
      past = past.append(reading.keys, reading.values)
      queries = reading.queries.map((query, l) => lastRows(queries[l] ? appendRows(queries[l], query) : query, window))
      logits = lastLogits(reading)
      progress(Math.min(begin + CHUNK, prompt.length) / prompt.length)
    }
    return { past, logits, queries }
  }
}

/** The logits after the last token read, [vocabulary]. */
export function lastLogits({ logits }: Reading): Float32Array {
  return floats(logits).slice(-logits.dims[1]!)
}

function integers(values: ArrayLike<number>): Tensor {
  return new Tensor('int64', BigInt64Array.from(values, BigInt), [values.length])
}
