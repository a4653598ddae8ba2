import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { InferenceSession, Tensor as OnnxTensor } from 'onnxruntime-node'
import { LaproxError } from '../errors.js'
import { type OnnxTensors, PaddedPast } from '../onnxruntime.js'
import { Tensor } from '../tensor.js'

/** The sizes of a decoder, from its config.json. */
export interface DecoderShape {
  readonly layers: number
  readonly queryHeads: number
  readonly kvHeads: number
  readonly headDim: number
}

/** A prompt that was read to its end. */
export interface Prefill {
  readonly past: PaddedPast
  /** The logits that follow the prompt's last token, [vocabulary]. */
  readonly logits: Float32Array
  /** The observation window: queries of the prompt's last tokens, a layer each, [queryHeads, window, headDim]. */
  readonly queries: readonly Tensor<'float32'>[]
}

/** A prompt is read in pieces of this many tokens. */
const pieceTokens = 512

/** A decoder in ONNX Runtime. Its graph reads new tokens after any past: the whole one, or what an eviction left of it. */
export class LanguageModel {
  readonly shape: DecoderShape
  readonly #session: InferenceSession

  private constructor(shape: DecoderShape, session: InferenceSession) {
    this.shape = shape
    this.#session = session
  }

  /**
   * Opens config.json and extend.onnx (its weights are in model.safetensors) of a folder.
   *
   * @param threads default: ONNX Runtime's, one a core
   * @throws LaproxError (as a rejection) `IO`, `BAD_FILE`
   */
  static async load(folder: string, threads?: number): Promise<LanguageModel> {
    const shape = await readShape(join(folder, 'config.json'))
    // Its threads would go on spinning after each run, on the very cores that laprox needs next.
    const extra = { session: { intra_op: { allow_spinning: '0' } } }
    const options = { extra, ...(threads === undefined ? {} : { intraOpNumThreads: threads, interOpNumThreads: 1 }) }
    const graph = join(folder, 'extend.onnx')
    try {
      return new LanguageModel(shape, await InferenceSession.create(graph, options))
    } catch (error) {
      throw new LaproxError('BAD_FILE', `${graph} could not be opened by ONNX Runtime: ${(error as Error).message}`, { cause: error })
    }
  }

  /**
   * Reads `tokens` after `past`, which stays as it is: {@link PaddedPast.append} takes them in.
   *
   * @returns the logits [tokens, vocabulary] as `logits`, and of each layer l `query.l` [queryHeads, tokens, headDim], `key.l` and
   *   `value.l` [kvHeads, tokens, headDim]; queries and keys rotated
   */
  extend(past: PaddedPast, tokens: ArrayLike<number>): Promise<OnnxTensors> {
    return this.#session.run({ ids: integers(tokens), position: integers(past.contextLengths), ...past.feeds })
  }

  /** Reads a whole prompt and keeps the queries of its last `window` tokens, which may come from more than one piece. */
  async prefill(prompt: Int32Array, window: number, progress: (done: number) => void = () => {}): Promise<Prefill> {
    const past = PaddedPast.empty(this.shape)
    const pieces: OnnxTensors[] = []
    for (let begin = 0; begin < prompt.length; begin += pieceTokens) {
      const outputs = await this.extend(past, prompt.subarray(begin, begin + pieceTokens))
      past.append(outputs)
      pieces.push(outputs)
      // The pieces before the last ones are let go of: logits and queries are as large as the cache.
      if (begin + pieceTokens < prompt.length - window) pieces.length = 0
      progress(Math.min(begin + pieceTokens, prompt.length) / prompt.length)
    }
    const queries = Array.from({ length: this.shape.layers }, (_, layer) =>
      lastRows(
        pieces.map((outputs) => outputs[`query.${layer}`]!),
        window,
      ),
    )
    return { past, logits: lastLogits(pieces.at(-1)!), queries }
  }

  /** Lets go of the session. */
  async release(): Promise<void> {
    await this.#session.release()
  }
}

/** The logits after the last token read, [vocabulary]. */
export function lastLogits({ logits }: OnnxTensors): Float32Array {
  return (logits!.data as Float32Array).slice(-logits!.dims[1]!)
}

/** The token of the largest logit. */
export function likeliest(logits: Float32Array): number {
  let best = 0
  for (let token = 1; token < logits.length; token++) if (logits[token]! > logits[best]!) best = token
  return best
}

/** The last `count` rows of each head, or all where there are fewer, of tensors [heads, rows, width] that follow each other. */
function lastRows(pieces: readonly OnnxTensor[], count: number): Tensor<'float32'> {
  const [heads, width] = [pieces[0]!.dims[0]!, pieces[0]!.dims[2]!]
  const total = pieces.reduce((sum, { dims }) => sum + dims[1]!, 0)
  const kept = Math.min(count, total)
  const last = new Float32Array(heads * kept * width)
  let row = kept - total
  for (const { data, dims } of pieces) {
    const rows = dims[1]!
    const skipped = Math.max(-row, 0)
    if (skipped < rows) {
      for (let h = 0; h < heads; h++) {
        const from = (data as Float32Array).subarray((h * rows + skipped) * width, (h + 1) * rows * width)
        last.set(from, (h * kept + row + skipped) * width)
      }
    }
    row += rows
  }
  return new Tensor('float32', last, [heads, kept, width])
}

function integers(values: ArrayLike<number>): OnnxTensor {
  return new OnnxTensor('int64', BigInt64Array.from(values, BigInt), [values.length])
}

async function readShape(file: string): Promise<DecoderShape> {
  let config: Readonly<Record<string, unknown>>
  try {
    config = JSON.parse(await readFile(file, 'utf8'))
  } catch (error) {
    const code = error instanceof SyntaxError ? 'BAD_FILE' : 'IO'
    throw new LaproxError(code, `${file} could not be read: ${(error as Error).message}`, { cause: error })
  }
  const count = (name: string, fallback?: number): number => {
    const value = config[name] ?? fallback
    if (Number.isInteger(value) && (value as number) > 0) return value as number
    throw new LaproxError(
      'BAD_FILE',
      `${file}: ${name} is ${value === undefined ? 'missing' : JSON.stringify(value)}; expected an integer of at least 1`,
    )
  }
  const queryHeads = count('num_attention_heads')
  return {
    layers: count('num_hidden_layers'),
    queryHeads,
    kvHeads: count('num_key_value_heads', queryHeads),
    headDim: config.head_dim === undefined ? count('hidden_size') / queryHeads : count('head_dim'),
  }
}
