import { KvCache } from './cache.js'
import type { CallOptions } from './call.js'
import { object } from './check.js'
import { type Device, sharedDevice } from './device.js'
import { closest, LaproxError, show, suggest, throwIfAborted } from './errors.js'
import type { LaterQueries } from './fidelity.js'
import { AttentionModel, type PerLayer } from './model.js'
import { readSafetensors, readSafetensorsHeader, type SafetensorsEntry } from './safetensors.js'
import { type FloatType, type Tensor, toFloat32 } from './tensor.js'
import type { Window } from './window.js'

/** The version of the format, as metadata `laprox.capture` has it. */
const version = '1'

/** The tensors of a layer: `layers.<layer>.<kind>`. */
const kinds = {
  keys: { dims: '[kvHeads, tokens, headDim]', required: true },
  values: { dims: '[kvHeads, tokens, headDim]', required: true },
  queries: { dims: '[queryHeads, m, headDim]', required: true },
  output_projection: { dims: '[D, queryHeads * headDim]', required: true },
  log_sum_exp: { dims: '[queryHeads, m]', required: false },
  later_queries: { dims: '[queryHeads, k, headDim]', required: false },
  sink_logits: { dims: '[queryHeads]', required: false },
} as const
type Kind = keyof typeof kinds
const kindNames = Object.keys(kinds) as Kind[]
const metadataNames = ['laprox.capture', 'model', 'tokens', 'scale', 'soft_cap', 'sliding_window']

/** Most rows of `later_queries`: what a window may have. */
const mostLater = 128
const floatTypes: readonly (string | undefined)[] = ['float32', 'float16', 'bfloat16'] satisfies FloatType[]

/** What {@link readCapture} takes. */
export interface CaptureOptions extends Pick<CallOptions, 'signal' | 'progress'> {
  /** Where the model and the cache are to be. Default: the CPU device that calls without one share. */
  readonly device?: Device | undefined
}

/** What a model had in its cache after a prompt, from a file, ready to be evicted from: see {@link readCapture}. */
export class Capture implements Disposable {
  /** What the model is called, where the file says. */
  readonly name: string | undefined
  /** The attention of the model, on the device that was asked for. */
  readonly model: AttentionModel
  /** What it had in its cache, there too. */
  readonly cache: KvCache
  /** The last queries of the prompt. */
  readonly window: Window
  /** The queries that came after the prompt, where the file has them. */
  readonly later: LaterQueries | undefined
  /** The text of each token of the prompt. */
  readonly tokens: readonly string[] | undefined
  readonly #tensors: readonly Tensor[]

  /** Internal to lib: {@link readCapture} makes captures. */
  constructor(parts: Pick<Capture, 'name' | 'model' | 'cache' | 'window' | 'later' | 'tokens'>, tensors: readonly Tensor[]) {
    this.name = parts.name
    this.model = parts.model
    this.cache = parts.cache
    this.window = parts.window
    this.later = parts.later
    this.tokens = parts.tokens
    this.#tensors = tensors
  }

  /** Lets go of the model, the cache and all tensors, after the calls that use them. */
  dispose(): void {
    this.model.dispose()
    this.cache.dispose()
    for (const tensor of this.#tensors) tensor.dispose()
  }

  /** What `using` calls: {@link Capture.dispose}. */
  [Symbol.dispose](): void {
    this.dispose()
  }
}

/**
 * Reads a captured cache: a safetensors file with, for each layer, keys, values, queries and the output projection (docs/captures.md
 * has the names and shapes). Everything the file says of itself is checked before the first tensor is read; layers are read one after
 * the other, and those for a GPU do not stay in host memory.
 *
 *     using capture = await readCapture('prompt.safetensors', { device })
 *     const { model, cache, window } = capture
 *     const { cache: kept } = await evict(model, cache, window, policies.laprox({ keep: 0.05 }))
 *
 * @throws LaproxError (as a rejection) `BAD_FILE` for a file that is no capture: names the tensor or the metadata, what it was and
 *   what it should be, and for one that is missing the closest names that the file has; `IO`, `OUT_OF_MEMORY`, `ABORTED`
 */
export async function readCapture(file: string | URL, options: CaptureOptions = {}): Promise<Capture> {
  object(options, 'options', 'an object')
  const { signal, progress } = options
  throwIfAborted(signal)
  const { entries, metadata } = await readSafetensorsHeader(file)
  const outline = checkCapture(String(file), entries, metadata)
  const device = options.device ?? (await sharedDevice())
  const read: Record<Kind, Tensor[]> = {
    keys: [],
    values: [],
    queries: [],
    output_projection: [],
    log_sum_exp: [],
    later_queries: [],
    sink_logits: [],
  }
  const all = (): Tensor[] => Object.values(read).flat()
  try {
    const sinkLogits: (Float32Array | null)[] = []
    for (const [layer, names] of outline.layers.entries()) {
      const { tensors } = await readSafetensors(file, { names: [...names.values()], signal })
      const sink = names.get('sink_logits')
      sinkLogits.push(sink === undefined ? null : toFloat32(tensors.get(sink) as Tensor<FloatType>))
      for (const [kind, name] of names) {
        const tensor = tensors.get(name)!
        // A model takes weights and sink logits from the host.
        const stays = kind === 'output_projection' || kind === 'sink_logits'
        const placed = stays ? tensor : await tensor.to(device, { signal })
        read[kind].push(placed)
        if (placed !== tensor) tensor.dispose()
      }
      progress?.((layer + 1) / outline.layers.length)
    }
    const { queryHeads, kvHeads, headDim, scale, softCap, slidingWindow } = outline
    const { output_projection: outputProjections, queries, keys, values } = read
    const layers = outline.layers.length
    const description = { layers, queryHeads, kvHeads, headDim, outputProjections, scale, softCap, slidingWindow, sinkLogits }
    const cache = KvCache.from(device, { keys, values })
    const model = AttentionModel.create(device, description)
    const window = read.log_sum_exp.length > 0 ? { queries, logSumExp: read.log_sum_exp } : { queries }
    const later = read.later_queries.length > 0 ? { queries: read.later_queries } : undefined
    return new Capture({ name: metadata.model, model, cache, window, later, tokens: outline.tokens }, all())
  } catch (error) {
    for (const tensor of all()) tensor.dispose()
    throw error
  }
}

/** What a file holds, checked. */
interface Outline {
  /** Per layer the names of its tensors. */
  readonly layers: readonly ReadonlyMap<Kind, string>[]
  readonly queryHeads: number
  readonly kvHeads: number
  readonly headDim: number
  readonly scale: PerLayer<number> | undefined
  readonly softCap: PerLayer<number> | undefined
  readonly slidingWindow: PerLayer<number> | undefined
  readonly tokens: readonly string[] | undefined
}

function checkCapture(file: string, entries: readonly SafetensorsEntry[], metadata: Readonly<Record<string, string>>): Outline {
  const wrongFile = (what: string): LaproxError => new LaproxError('BAD_FILE', `${file}: ${what}`)
  const layers = checkNames(file, entries)
  const { keys, queries } = checkTensors(new Map(entries.map((entry) => [entry.name, entry])), layers, wrongFile)
  const [kvHeads, tokens, headDim] = keys as [number, number, number]
  for (const name of Object.keys(metadata)) {
    const match = metadataNames.includes(name) ? undefined : closest(name, metadataNames)
    if (match !== undefined) throw wrongFile(`metadata ${show(name)} is none of a capture's; did you mean '${match}'?`)
  }
  if (metadata['laprox.capture'] !== version) {
    const what = metadata['laprox.capture'] === undefined ? 'missing' : show(metadata['laprox.capture'])
    throw wrongFile(`metadata 'laprox.capture' is ${what}; expected '${version}', the version of the format`)
  }
  const numbers = (name: string, integers = false): PerLayer<number> | undefined => {
    const text = metadata[name]
    if (text === undefined) return undefined
    const value = parse(text)
    const list = Array.isArray(value) ? value : [value]
    const fits = (item: unknown): boolean => (integers ? Number.isSafeInteger(item) : Number.isFinite(item)) && (item as number) >= 0
    if (list.every(fits) && (list === value ? list.length === layers.length : true)) return value as PerLayer<number>
    const expected = integers ? 'an integer of at least 0' : 'a number of at least 0'
    throw wrongFile(`metadata '${name}' is ${show(text)}; expected ${expected}, or a JSON array with one per layer, ${layers.length}`)
  }
  const texts = metadata.tokens === undefined ? undefined : parse(metadata.tokens)
  if (metadata.tokens !== undefined && !isTexts(texts))
    throw wrongFile(`metadata 'tokens' is ${show(metadata.tokens)}; expected a JSON array of strings`)
  if (isTexts(texts) && texts.length !== tokens) {
    throw wrongFile(`metadata 'tokens' has ${texts.length} texts; expected one per token of '${nameOf(0, 'keys')}', ${tokens}`)
  }
  return {
    layers,
    queryHeads: queries[0]!,
    kvHeads,
    headDim,
    scale: numbers('scale'),
    softCap: numbers('soft_cap'),
    slidingWindow: numbers('sliding_window', true),
    tokens: isTexts(texts) ? texts : undefined,
  }
}

function nameOf(layer: number, kind: Kind): string {
  return `layers.${layer}.${kind}`
}

const known = new RegExp(`^layers\\.(0|[1-9]\\d{0,5})\\.(${kindNames.join('|')})$`)

/** Which tensors each layer has. Names beyond `layers.` are nobody's business. */
function checkNames(file: string, entries: readonly SafetensorsEntry[]): ReadonlyMap<Kind, string>[] {
  const names = new Set(entries.map(({ name }) => name))
  let count = 1
  for (const name of names) count = Math.max(count, 1 + Number(/^layers\.(\d{1,6})\./.exec(name)?.[1] ?? 0))
  const strangers = [...names].filter((name) => !known.test(name))
  const layers: Map<Kind, string>[] = []
  for (let layer = 0; layer < count; layer++) {
    const layerNames = new Map<Kind, string>()
    for (const kind of kindNames) {
      const name = nameOf(layer, kind)
      if (names.has(name)) layerNames.set(kind, name)
      // What is not for each layer is of no use; but a layer may do without sink logits.
      else if (kinds[kind].required || (kind !== 'sink_logits' && layers[0]?.has(kind))) throw missing(file, name, kinds[kind].dims, strangers, names)
    }
    layers.push(layerNames)
  }
  for (const name of strangers) {
    const kind = /^layers\.\d+\.(.*)/.exec(name)?.[1]
    if (kind !== undefined) throw new LaproxError('BAD_FILE', `${file}: tensor ${show(name)} is none of a capture's; ${suggest(kind, kindNames)}`)
  }
  for (const kind of ['log_sum_exp', 'later_queries'] as const) {
    const layer = layers.findIndex((layerNames) => layerNames.has(kind))
    if (layer > 0) throw missing(file, nameOf(0, kind), kinds[kind].dims, strangers, names)
  }
  return layers
}

/** An error for a tensor that is not there: what it would be, and the closest names among those that nothing else explains. */
function missing(file: string, name: string, dims: string, strangers: readonly string[], names: ReadonlySet<string>): LaproxError {
  const match = closest(name, strangers)
  const found = strangers.length > 0 ? strangers : [...names]
  const more = found.length > 4 ? `, ... ${found.length - 4} more` : ''
  const list = found.slice(0, 4).map(show).join(', ')
  const hint = match === undefined ? (found.length === 0 ? 'it has none at all' : `found ${list}${more}`) : `the closest name found is ${show(match)}`
  return new LaproxError('BAD_FILE', `${file} has no tensor '${name}' ${dims}; ${hint}`)
}

/**
 * Checks types and shapes: those of layer 0 against its keys and queries, those of the others against layer 0.
 *
 * @returns the dimensions of keys and queries
 */
function checkTensors(
  entries: ReadonlyMap<string, SafetensorsEntry>,
  layers: readonly ReadonlyMap<Kind, string>[],
  wrongFile: (what: string) => LaproxError,
): { keys: readonly number[]; queries: readonly number[] } {
  const wrongTensor = (entry: SafetensorsEntry, expected: string): LaproxError =>
    wrongFile(`tensor '${entry.name}' is ${describe(entry)}; expected ${expected}`)
  /** Dims are -1 for any; `like` is the tensor that they come from. */
  const check = (layer: number, kind: Kind, dims: readonly number[], like?: SafetensorsEntry): SafetensorsEntry => {
    const entry = entries.get(nameOf(layer, kind))!
    const alike = kind === 'values' || (layer > 0 && kind !== 'sink_logits')
    const types = kind === 'log_sum_exp' ? ['float32'] : alike ? [like!.type] : floatTypes
    const fits = entry.dims.length === dims.length && dims.every((dim, i) => dim === -1 || dim === entry.dims[i])
    if (fits && types.includes(entry.type)) return entry
    const sizes = dims.every((dim) => dim === -1) ? '' : ` = [${dims.map((dim) => (dim === -1 ? 'any' : dim)).join(', ')}]`
    const because = like === undefined ? '' : `, since '${like.name}' is ${describe(like)}`
    throw wrongTensor(entry, `${types === floatTypes ? 'float32, float16 or bfloat16' : types[0]} ${kinds[kind].dims}${sizes}${because}`)
  }
  const keys = check(0, 'keys', [-1, -1, -1])
  const [kvHeads, tokens, headDim] = keys.dims as [number, number, number]
  if (kvHeads < 1 || tokens < 1) throw wrongTensor(keys, 'at least one KV head and one token')
  if (headDim % 8 !== 0 || headDim < 8 || headDim > 256) throw wrongTensor(keys, 'a headDim that is a multiple of 8, from 8 to 256')
  const queries = check(0, 'queries', [-1, -1, headDim], keys)
  const [queryHeads, rows] = queries.dims as [number, number, number]
  if (queryHeads < 1 || queryHeads % kvHeads !== 0)
    throw wrongTensor(queries, `queryHeads that are a multiple of the KV heads of '${keys.name}', ${kvHeads}`)
  if (rows < 1 || rows > tokens) throw wrongTensor(queries, `the last m queries of the tokens of '${keys.name}', 1 <= m <= ${tokens}`)
  const first: Record<Kind, () => SafetensorsEntry> = {
    keys: () => keys,
    values: () => check(0, 'values', keys.dims, keys),
    queries: () => queries,
    output_projection: () => check(0, 'output_projection', [-1, queryHeads * headDim], queries),
    log_sum_exp: () => check(0, 'log_sum_exp', [queryHeads, rows], queries),
    later_queries: () => check(0, 'later_queries', [queryHeads, -1, headDim], queries),
    sink_logits: () => check(0, 'sink_logits', [queryHeads], queries),
  }
  for (const kind of kindNames) {
    let like: SafetensorsEntry | undefined
    for (const [layer, names] of layers.entries()) {
      if (!names.has(kind)) continue
      if (layer === 0) like = first[kind]()
      else if (kind === 'sink_logits') check(layer, kind, [queryHeads], queries)
      else check(layer, kind, like!.dims, like)
    }
    if (kind === 'output_projection' && like!.dims[0] === 0) throw wrongTensor(like!, 'D of at least 1')
    if (kind === 'later_queries' && like !== undefined && (like.dims[1]! < 1 || like.dims[1]! > mostLater)) {
      throw wrongTensor(like, `k later queries, 1 <= k <= ${mostLater}`)
    }
  }
  return { keys: keys.dims, queries: queries.dims }
}

function describe({ dtype, type, dims }: SafetensorsEntry): string {
  return `${type ?? dtype} ${show(dims)}`
}

function isTexts(value: unknown): value is string[] {
  return Array.isArray(value) && value.every((text) => typeof text === 'string')
}

/** Undefined for what is no JSON. */
function parse(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}
