import { Buffer } from 'node:buffer'
import type { CacheState, KvCache } from './cache.js'
import { asksNothing, type CallOptions, call, type Hooks, noHooks } from './call.js'
import { allocate, integer, object, wrong } from './check.js'
import { type Device, handleOf, sharedDevice } from './device.js'
import { startWork } from './enqueue.js'
import { LaproxError } from './errors.js'
import { DeviceMemory } from './memory.js'
import type { AttentionModel } from './model.js'
import { deviceNumbers, type Held, type NativeHandle, native, reportNumbers, type Section, SectionWriter, stage } from './native.js'
import type { Policy } from './policy.js'
import { mostKept, type Rules, rulesOf } from './rules.js'
import { checkArray, type ScoreInputs, type Scores, type Shape, scoreInputs, sectionOf, segmentIndex } from './score.js'
import { elementBytes, memoryOf, onDevice, Tensor } from './tensor.js'
import type { Window } from './window.js'

/** How a selection came about. */
export interface SelectReport {
  /** Entries there were, of all sequences. */
  readonly entries: number
  /** Entries kept of them. */
  readonly kept: number
  /** Of those kept, entries that the policy protects. */
  readonly protectedEntries: number
  /** NaN and infinite scores, kept because of `nonFinite: 'keep'`. */
  readonly nonFinite: number
  /** Whether bounds spared most exact scores, or every entry was scored. */
  readonly path: 'pruned' | 'full'
  /** Entries whose upper bound reached the proven threshold; all entries on the full path. */
  readonly candidates: number
  /** Entries whose exact score was computed; of others bounds or estimates were enough. */
  readonly exactScores: number
  /** Why the full path ran where pruning was possible. */
  readonly fallback?: string
  /** Milliseconds of scoring (bounds included); 0 for given scores, and on a GPU, whose time events tell. */
  readonly msScore: number
  /** Milliseconds of ranking; 0 on a GPU. */
  readonly msSelect: number
}

/** A selection that comes from elsewhere. */
export interface SelectionDescription {
  /** L. */
  readonly layers: number
  /** S. Default 1. */
  readonly sequences?: number | undefined
  /** G. */
  readonly kvHeads: number
  /** The kept tokens of all segments, one after the other, ascending in each: not copied. */
  readonly tokens: Int32Array
  /** [segments] kept tokens of each. */
  readonly counts: ArrayLike<number>
}

/** Tokens and offsets of a selection for native code; throws `DETACHED` where their memory is gone. */
let selectionSection: (selection: Selection) => Section
/** A selection over memory that native code fills; its tokens may be on a GPU. */
export let selectionOf: (shape: Shape, memory: Float64Array, tokens?: DeviceMemory) => Selection

/**
 * Which tokens of each segment are kept. A *segment* is one (layer, sequence, KV head); segments are numbered
 * (layer * sequences + sequence) * kvHeads + head. A selection made on a GPU has its counts and its report here, and its tokens
 * there, ready to compact: {@link Selection.to} copies them. Dispose of it, or let the garbage collector.
 */
export class Selection implements Shape, Disposable {
  /** L. */
  readonly layers: number
  /** S. */
  readonly sequences: number
  /** G. */
  readonly kvHeads: number
  /** [segments + 1] offsets, the report, and (unless they come from elsewhere) the tokens: see `Section` in native.ts. */
  readonly #memory: Float64Array
  #tokens: Int32Array | undefined
  /** Where the tokens are, on a GPU. */
  readonly #device: DeviceMemory | undefined
  #tensor: Tensor<'int32'> | undefined
  #offsets: Float64Array | undefined
  #report: SelectReport | undefined

  private constructor(shape: Shape, memory: Float64Array, tokens?: Int32Array | DeviceMemory) {
    this.layers = shape.layers
    this.sequences = shape.sequences
    this.kvHeads = shape.kvHeads
    this.#memory = memory
    if (tokens instanceof DeviceMemory) this.#device = tokens
    else this.#tokens = tokens
  }

  static {
    selectionOf = (shape, memory, tokens) => new Selection(shape, memory, tokens)
    selectionSection = (selection) => {
      if (!(selection instanceof Selection)) throw wrong('selection', selection, 'a Selection')
      if (selection.#device !== undefined) {
        const { tensor } = selection
        const writer = new SectionWriter()
        writer.place(tensor).push(tensor.size, writer.buffer(selection.offsets))
        return writer.section()
      }
      const { tokens, offsets } = selection
      if (tokens.length !== offsets.at(-1)) {
        throw new LaproxError('DETACHED', 'the buffer of the selection has been detached: it was transferred elsewhere')
      }
      return { numbers: Float64Array.of(2, 0, 1), buffers: [tokens, offsets] }
    }
  }

  /**
   * A selection that comes from elsewhere, to be compacted. Whether tokens ascend and exist is checked by {@link compact}.
   *
   * @throws LaproxError `INVALID_ARGUMENT` for arrays that do not fit together
   */
  static from(description: SelectionDescription): Selection {
    object(description, 'description', 'an object with layers, kvHeads, tokens and counts')
    const { tokens, counts } = description
    const layers = integer(description.layers, 'layers', 1)
    const sequences = description.sequences === undefined ? 1 : integer(description.sequences, 'sequences', 1)
    const kvHeads = integer(description.kvHeads, 'kvHeads', 1)
    const segments = layers * sequences * kvHeads
    if (counts?.length !== segments) {
      throw new LaproxError('INVALID_ARGUMENT', `counts has ${counts?.length} numbers; expected one per segment, ${segments}`)
    }
    const memory = new Float64Array(tableLength(segments))
    for (let i = 0; i < segments; i++) memory[i + 1] = memory[i]! + integer(counts[i], `counts[${i}]`, 0)
    const kept = memory[segments]!
    checkArray(tokens, 'tokens', Int32Array, kept)
    memory[segments + 2] = kept
    return new Selection({ layers, sequences, kvHeads }, memory, tokens)
  }

  /** Where the tokens are. */
  get location(): 'cpu' | 'cuda' {
    return this.#device === undefined ? 'cpu' : 'cuda'
  }

  /** The GPU that has the tokens; undefined where the host has them. */
  get device(): Device | undefined {
    return this.#device?.device
  }

  /** The tokens as a tensor [entries], wherever they are: see {@link Selection.tokens}. */
  get tensor(): Tensor<'int32'> {
    if (this.#device === undefined) return new Tensor('int32', this.tokens, [this.tokens.length])
    this.#tensor ??= onDevice('int32', this.#device, [this.entries])
    return this.#tensor
  }

  /**
   * The same selection with its tokens on a device, or in host memory: itself where they are there, else a copy.
   *
   * @throws LaproxError (as a rejection) as {@link Tensor.to}
   */
  async to(device: Device | 'cpu', options?: CallOptions): Promise<Selection> {
    const { tensor } = this
    const moved = await tensor.to(device, options)
    if (moved === tensor) return this
    const table = this.#memory.slice(0, tableLength(this.#segments))
    return new Selection(this, table, moved.location === 'cpu' ? moved.data : memoryOf(moved))
  }

  /** Gives tokens in the memory of a GPU back, once the calls that use them have ended. Doing it twice is no error. */
  dispose(): void {
    this.#device?.dispose()
  }

  /** What `using` calls: {@link Selection.dispose}. */
  [Symbol.dispose](): void {
    this.dispose()
  }

  /**
   * The kept tokens of all segments, one after the other, ascending in each: indices into the segment, not positions.
   *
   * @throws LaproxError `DEVICE_MISMATCH` where they are in the memory of a GPU: see {@link Selection.to}
   */
  get tokens(): Int32Array {
    if (this.#device !== undefined) {
      throw new LaproxError(
        'DEVICE_MISMATCH',
        `the tokens of the selection are in the memory of ${this.#device.device.name}: copy them first, by await selection.to('cpu')`,
      )
    }
    this.#tokens ??= new Int32Array(this.#memory.buffer, tableLength(this.#segments) * 8, this.#memory[this.#segments])
    return this.#tokens
  }

  /** [segments + 1] where the tokens of each segment begin: a copy. */
  get offsets(): Float64Array {
    this.#offsets ??= this.#memory.slice(0, this.#segments + 1)
    return this.#offsets
  }

  /** [segments] kept tokens of each: a copy. */
  get counts(): Int32Array {
    const offsets = this.#memory
    const counts = new Int32Array(this.#segments)
    for (let i = 0; i < counts.length; i++) counts[i] = offsets[i + 1]! - offsets[i]!
    return counts
  }

  /** Kept tokens of all segments together. */
  get entries(): number {
    return this.#memory[this.#segments]!
  }

  /** How it came about; of a selection from elsewhere, `kept` alone is known. */
  get report(): SelectReport {
    this.#report ??= readReport(this.#memory, this.#segments + 1)
    return this.#report
  }

  /**
   * The kept tokens of one segment, ascending: a view.
   *
   * @throws LaproxError `OUT_OF_BOUNDS`
   */
  kept(layer: number, sequence: number, head: number): Int32Array {
    const x = segmentIndex(this, layer, sequence, head)
    const { tokens, offsets } = this
    return tokens.subarray(offsets[x]!, offsets[x + 1]!)
  }

  get #segments(): number {
    return this.layers * this.sequences * this.kvHeads
  }
}

/** The selection's section, once it is known to fit the cache and to be on its device. */
export function selectionOn(device: Device, state: CacheState, selection: Selection): Section {
  const kept = selectionSection(selection)
  if (selection.device !== (device.backend === 'cuda' ? device : undefined)) {
    const [where, copy] =
      selection.device === undefined
        ? ['in host memory', 'selection.to(device)']
        : [`in the memory of ${selection.device.name}`, "selection.to('cpu')"]
    throw new LaproxError(
      'DEVICE_MISMATCH',
      `the tokens of the selection are ${where}; expected them on the cache's device, ${device.name}: await ${copy}`,
    )
  }
  for (const name of ['layers', 'sequences', 'kvHeads'] as const) {
    if (selection[name] !== state[name]) {
      throw new LaproxError('INVALID_ARGUMENT', `selection: ${name} is ${selection[name]}; expected that of the cache, ${state[name]}`)
    }
  }
  return kept
}

export function tableLength(segments: number): number {
  return segments + 1 + reportNumbers.count + reportNumbers.fallbackBytes / 8
}

function readReport(table: Float64Array, first: number): SelectReport {
  const report: { -readonly [K in keyof SelectReport]: SelectReport[K] } = {
    entries: table[first]!,
    kept: table[first + 1]!,
    protectedEntries: table[first + 2]!,
    nonFinite: table[first + 3]!,
    path: table[first + 4] === 1 ? 'pruned' : 'full',
    candidates: table[first + 5]!,
    exactScores: table[first + 6]!,
    msScore: table[first + 7]! * 1000,
    msSelect: table[first + 8]! * 1000,
  }
  // All zeros: none, which is the usual case.
  if (table[first + reportNumbers.count] !== 0) {
    const bytes = Buffer.from(table.buffer, table.byteOffset + (first + reportNumbers.count) * 8, reportNumbers.fallbackBytes)
    const end = bytes.indexOf(0)
    report.fallback = bytes.toString('latin1', 0, end < 0 ? bytes.length : end)
  }
  return Object.freeze(report)
}

/** What {@link select} takes. */
export interface SelectOptions extends CallOptions {
  /**
   * Where to rank. Default: where the scores are, if on a GPU; else the device that the first call without one opens, a CPU
   * device that lives until the process ends.
   */
  readonly device?: Device | undefined
}

/**
 * Ranks scores and chooses what a policy keeps: exactly as many as its budget says, ties to the smaller (layer, head, token).
 * The policy's score rule and layer weights play no part; its pooling, scope, budget, floor and protection do.
 *
 * A selection of up to some 2,000 scores on a CPU device that has nothing else to do is made before this returns, in microseconds:
 * to wake a thread for it would take the JavaScript thread longer. Its promise is fulfilled without a turn of the event loop, so
 * a program that awaits thousands of these in a row should let others have a turn itself.
 *
 * @throws LaproxError (as a rejection) `INVALID_ARGUMENT`, `BUDGET_TOO_SMALL` where the budget is below what is protected,
 *   `NON_FINITE` (see {@link Policy.nonFinite}), `OUT_OF_MEMORY`, `DISPOSED`, `DETACHED`, `ABORTED`
 */
export function select(scores: Scores, policy: Policy, options?: SelectOptions): Promise<Selection> {
  // Written for few microseconds: no async function, no closure where nobody listens.
  try {
    const section = sectionOf(scores)
    const rules = rulesOf(policy)
    const device = options?.device
    if (scores.device === undefined && device?.backend === 'cpu' && asksNothing(options)) {
      return startSelect(handleOf(device), scores, section, rules, noHooks)
    }
    return selectWith(scores, section, rules, options)
  } catch (error) {
    return Promise.reject(error)
  }
}

async function selectWith(scores: Scores, section: Section, rules: Rules, options: SelectOptions | undefined): Promise<Selection> {
  const owner = options?.device ?? scores.device ?? (await sharedDevice())
  const device = handleOf(owner)
  if (scores.device !== (owner.backend === 'cuda' ? owner : undefined)) {
    throw new LaproxError(
      'DEVICE_MISMATCH',
      `the scores are ${scores.device === undefined ? 'in host memory' : `in the memory of ${scores.device.name}`}; expected them on the device that ranks, ${owner.name}: await scores.to(device)`,
    )
  }
  return call(owner, options, (hooks) =>
    owner.backend === 'cuda' ? startSelectOnDevice(owner, device, scores, section, rules, hooks) : startSelect(device, scores, section, rules, hooks),
  )
}

async function startSelectOnDevice(
  owner: Device,
  device: NativeHandle,
  scores: Scores,
  section: Section,
  rules: Rules,
  hooks: Hooks,
): Promise<Selection> {
  const tokens: NativeHandle = {}
  const table = new Float64Array(tableLength(scores.lengths.length))
  const work = { stages: stage.select, scores: section, selectRule: rules.select, tokens, table, keep: scores }
  return deviceSelection(owner, scores, table, tokens, await startWork(device, work, hooks))
}

/** A selection that a call has left on a GPU. */
export function deviceSelection(owner: Device, shape: Shape, table: Float64Array, tokens: NativeHandle, numbers: Float64Array): Selection {
  const kept = table[shape.layers * shape.sequences * shape.kvHeads]!
  const memory = new DeviceMemory(owner, numbers[deviceNumbers.tokens]!, kept * 4, tokens)
  return selectionOf(shape, table, memory)
}

function startSelect(device: NativeHandle, scores: Scores, section: Section, rules: Rules, hooks: Hooks): Promise<Selection> {
  const { memory } = room(rules.policy, scores, scores.data.length, scores.bytesPerEntry)
  const held: Held<Selection> = [selectionOf(scores, memory), hooks.progress, hooks.flag, ...section.buffers, memory]
  return native().select(device, section.numbers, rules.select, held)
}

/** Memory on the host for what a policy keeps of so many entries, and how many that is at most. */
interface Room {
  readonly memory: Float64Array
  readonly tokens: number
}

function room(policy: Policy, { layers, sequences, kvHeads }: Shape, entries: number, bytesPerEntry: number): Room {
  const segments = layers * sequences * kvHeads
  const tokens = mostKept(policy, entries, sequences, segments, bytesPerEntry)
  return { memory: allocate(Float64Array, tableLength(segments) + Math.ceil(tokens / 2), 'the selection'), tokens }
}

/** For a selection straight from a cache. */
export function roomFor({ state, rules }: ScoreInputs): Room {
  const entries = state.lengths.reduce((sum, length) => sum + length, 0)
  return room(rules.policy, state, entries, 2 * state.headDim * elementBytes(state.type))
}

/**
 * What a policy keeps of a cache: the same selection, to the bit, as `select(await score(...))`, but with few exact scores
 * where bounds prove that the others cannot be kept; the report tells how many.
 *
 * @param window may be null for policies that look at no query
 * @throws LaproxError (as a rejection) what {@link score} and {@link select} throw
 */
export async function selectFrom(
  model: AttentionModel,
  cache: KvCache,
  window: Window | null,
  policy: Policy,
  options?: CallOptions,
): Promise<Selection> {
  const inputs = scoreInputs(model, cache, window, policy)
  return call(inputs.owner, options, (hooks) => startSelectFrom(inputs, hooks))
}

function startSelectFrom(inputs: ScoreInputs, { progress, flag, streams }: Hooks): Promise<Selection> {
  const { model, state, cache, window, rules } = inputs
  if (inputs.owner.backend === 'cuda') return startSelectFromOnDevice(inputs, { progress, flag, streams })
  const { memory } = roomFor(inputs)
  const held: Held<Selection> = [selectionOf(state, memory), progress, flag, ...cache.buffers, ...window.buffers, memory]
  return native().selectCache(model, cache.numbers, window.numbers, rules.score, rules.select, held)
}

async function startSelectFromOnDevice(inputs: ScoreInputs, hooks: Hooks): Promise<Selection> {
  const { owner, device, model, state, cache, window, rules } = inputs
  const tokens: NativeHandle = {}
  const table = new Float64Array(tableLength(state.lengths.length))
  const numbers = await startWork(
    device,
    { stages: stage.selectCache, model, cache, window, scoreRule: rules.score, selectRule: rules.select, tokens, table, keep: inputs },
    hooks,
  )
  return deviceSelection(owner, state, table, tokens, numbers)
}
