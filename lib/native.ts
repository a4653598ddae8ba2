import { existsSync, statSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { LaproxError } from './errors.js'
import { elementBytes, placeOf, type Tensor } from './tensor.js'

/** Raised with every change of the functions, their arguments or a section's numbers: native/addon/addon.cpp has the same number. */
const bindingVersion = 5
/** LAPROX_ABI_VERSION of native/include/laprox/laprox.h. */
const abiVersion = 3

/** Stands for a native object. Empty to JavaScript; the native side knows each kind by its type tag. */
export interface NativeHandle {
  readonly [nativeKind]?: never
}
declare const nativeKind: unique symbol

/**
 * What one call holds on to until it is settled: what its promise is fulfilled with, its progress function (or, for calls on a
 * GPU, whatever else must not be collected), its abort flag (an Int32Array that is 0 until the call should end), then every
 * typed array that native code reads or writes.
 */
export type Held<T> = [
  result: T,
  progress: ((done: number) => void) | object | undefined,
  flag: Int32Array | undefined,
  ...buffers: ArrayBufferView[],
]

/**
 * A description as flat numbers, and the typed arrays it talks about. The numbers begin with how many arrays there are; an
 * array is named by its index among them, -1 for none. Where there is an offset beside it, -2 stands for memory of a GPU, and
 * its address for the offset; lengths and the like of a call on a GPU are typed arrays, which go up with the call. Booleans and enumerators are their numbers in laprox.h. The sections:
 *
 * - model: layers, queryHeads, kvHeads, headDim, modelDim, dtype, then per layer: projection (buffer, byte offset, bytes),
 *   its row and column stride in bytes, scale, softCap, slidingWindow, sink logits (buffer)
 * - cache: dtype, layers, sequences, kvHeads, headDim, context lengths (buffer), then per layer: the planes of keys, values,
 *   positions and value norms, page size, pages per row, page table (buffer, element offset, sequence stride, head stride),
 *   lengths (buffer, element offset, sequence stride, head stride)
 * - a plane: buffer, byte offset, bytes, page stride, token stride, head stride in bytes
 * - window: layers (0: there is none), dtype, rows, base of the log-sum-exp, then per layer: queries (buffer, byte offset,
 *   bytes, sequence, head and row stride in bytes), log-sum-exp (the same)
 * - scores: layers, sequences, kvHeads, bytes per entry, then buffers: lengths, data, positions, context lengths; on a GPU
 *   layers, sequences, kvHeads, bytes per entry, stride of a segment, lengths, context lengths (buffers), data, positions (places)
 * - score rule: statistic, attention, value, aggregation, sharing, seed, number of layer weights, the weights
 * - select rule: pooling, its width, scope, kind of budget, ratio, amount, floor, pyramid beta, sinks, recent, non-finite,
 *   number of pinned ranges, their begins and ends
 * - selection: tokens (buffer), offsets (buffer); on a GPU tokens (place), their number, offsets (buffer)
 * - target: lpx_target, width of the page table, number of sets of planes, per set the four planes and the page size, number
 *   of free lists, their buffers; on a GPU also the room for ids of freed pages
 */
export interface Section {
  readonly numbers: Float64Array
  readonly buffers: readonly ArrayBufferView[]
}

/** A section with typed arrays that its numbers do not name: held, and looked at again at the end, like the others. */
export function holding(section: Section, more: readonly ArrayBufferView[]): Section {
  if (more.length === 0) return section
  const { numbers, buffers } = section
  return { numbers: Float64Array.from(numbers, (value, i) => (i === 0 ? value + more.length : value)), buffers: [...buffers, ...more] }
}

/** What stands between a selection's [segments + 1] offsets and its tokens: numbers of the report, then the bytes of `fallback`. */
export const reportNumbers: { readonly count: number; readonly fallbackBytes: number } = { count: 9, fallbackBytes: 64 }

/** What laprox.node exports. Everything that computes returns a promise of `held[0]` and runs on the device's own thread, or at once if it is brief and nothing is under way there. */
export interface Native {
  readonly abiVersion: number
  readonly bindingVersion: number
  /** Of the library, "0.1.0". */
  readonly version: string
  /** Errors are made of this class from now on. */
  initialize(errorClass: typeof LaproxError): void
  backendInfo(backend: number): [available: boolean, deviceCount: number, code: string, reason: string]
  /** held[0], an empty object, becomes the handle. */
  openDevice(backend: number, index: number, threads: number, isa: number, kernels: number, held: Held<NativeHandle>): Promise<NativeHandle>
  /** Calls under way go on; new ones are refused. */
  closeDevice(device: NativeHandle): void
  /** Why a device cannot be used any more; empty where it can. */
  deviceLost(device: NativeHandle): string
  deviceInfo(device: NativeHandle): [backend: number, index: number, threads: number, memoryBytes: number, name: string, isa: string]
  /** Ends those queued calls whose flag is set; running ones see it by themselves. */
  sweep(device: NativeHandle): void
  /** held[0], an empty object, becomes the handle, at once; the promise says when the factors are there. */
  createModel(device: NativeHandle, model: Float64Array, held: Held<NativeHandle>): Promise<NativeHandle>
  closeModel(model: NativeHandle): void
  /** Further buffers: scores, positions (or an empty array), [seconds]. */
  score<T>(model: NativeHandle, cache: Float64Array, window: Float64Array, rule: Float64Array, held: Held<T>): Promise<T>
  /** Further buffer: the selection's memory, a Float64Array of its offsets, its report and its tokens. */
  select<T>(device: NativeHandle, scores: Float64Array, rule: Float64Array, held: Held<T>): Promise<T>
  /** Further buffer: the selection's memory. */
  selectCache<T>(
    model: NativeHandle,
    cache: Float64Array,
    window: Float64Array,
    scoreRule: Float64Array,
    selectRule: Float64Array,
    held: Held<T>,
  ): Promise<T>
  /** CPU: selectCache, of every exact score where `exhaustive`, then compact. Further buffers: the selection's memory, and those of compact. */
  evict<T>(
    model: NativeHandle,
    cache: Float64Array,
    window: Float64Array,
    scoreRule: Float64Array,
    selectRule: Float64Array,
    target: Float64Array,
    exhaustive: boolean,
    held: Held<T>,
  ): Promise<T>
  /** Further buffer: squared norms [layers, 2] of what keeping changes of the outputs, and of the outputs. `ahead`: see lpx_fidelity. */
  fidelity<T>(model: NativeHandle, cache: Float64Array, window: Float64Array, ahead: number, selection: Float64Array, held: Held<T>): Promise<T>
  /** Further buffers: [seconds, ...pages used or freed], page ids. */
  compact<T>(device: NativeHandle, cache: Float64Array, selection: Float64Array, target: Float64Array, held: Held<T>): Promise<T>
  /** CPU: writes the planes of value norms. */
  valueNorms<T>(device: NativeHandle, cache: Float64Array, held: Held<T>): Promise<T>

  // GPUs. `streams`: the stream, an event to wait for, an event to record, as numbers; 0 for the device's own, none, none.

  /**
   * Stages of one call, a sum of {@link stage}. `handles` are of the memory that the call allocates, for tokens, scores, rows and a page
   * table: empty objects, which become handles. Further buffers: {@link deviceNumbers}, the selection's memory without
   * tokens, counts of pages, ids of freed pages.
   */
  enqueue<T>(
    device: NativeHandle,
    model: NativeHandle | null,
    streams: Float64Array,
    stages: number,
    cache: Float64Array | null,
    window: Float64Array | null,
    scoreRule: Float64Array | null,
    selectRule: Float64Array | null,
    scores: Float64Array | null,
    selection: Float64Array | null,
    target: Float64Array | null,
    handles: readonly (NativeHandle | null)[],
    held: Held<T>,
  ): Promise<T>
  /** `handle`, an empty object, becomes the memory's. Further buffer: [address]. */
  allocateMemory<T>(device: NativeHandle, streams: Float64Array, handle: NativeHandle, bytes: number, held: Held<T>): Promise<T>
  freeMemory(memory: NativeHandle): void
  /** As allocateMemory; the buffer after [address] is copied, to an address where one stands in place of the handle. */
  upload<T>(device: NativeHandle, streams: Float64Array, handle: NativeHandle | number, bytes: number, held: Held<T>): Promise<T>
  /** held[0] gets `data`. */
  download<T extends { data?: ArrayBuffer }>(device: NativeHandle, streams: Float64Array, address: number, bytes: number, held: Held<T>): Promise<T>
  /** Asks for huge pages for memory that nobody has written yet. Returns the offset of its first cache line. */
  settle(buffer: ArrayBuffer): number
}

/** The stages of {@link Native.enqueue}; `exhaustive`: `selectCache` computes every exact score. */
export const stage = { valueNorms: 1, score: 2, select: 4, selectCache: 8, compact: 16, exhaustive: 32 } as const

/** What {@link Native.enqueue} tells about the memory it allocated: addresses, the scores' stride, the number of kept rows. */
export const deviceNumbers = {
  tokens: 0,
  scores: 1,
  stride: 2,
  rows: 3,
  keys: 4,
  values: 5,
  positions: 6,
  valueNorms: 7,
  table: 8,
  count: 9,
} as const

const noBuffers: readonly ArrayBufferView[] = []

/** Collects the numbers and typed arrays of a {@link Section}, once. */
export class SectionWriter {
  /** Of a writer that is done, for the next one: each call on a GPU describes hundreds of numbers. */
  static #room: Float64Array | undefined
  #numbers = SectionWriter.#room ?? new Float64Array(1 << 10)
  #count = 1
  #buffers: Map<ArrayBufferView, number> | undefined

  constructor() {
    SectionWriter.#room = undefined
  }

  push(...numbers: readonly number[]): this {
    const count = this.#count + numbers.length
    if (count > this.#numbers.length) this.#grow(count)
    for (let i = 0; i < numbers.length; i++) this.#numbers[this.#count + i] = numbers[i]!
    this.#count = count
    return this
  }

  /** The index of a typed array, which many records may share; -1 for none. */
  buffer(data: ArrayBufferView | undefined): number {
    if (data === undefined) return -1
    this.#buffers ??= new Map()
    let index = this.#buffers.get(data)
    if (index === undefined) {
      index = this.#buffers.size
      this.#buffers.set(data, index)
    }
    return index
  }

  /** Where the tensor's first element is, or the one `skipped` elements further on: two numbers. */
  place(tensor: Tensor | undefined, skipped = 0): this {
    if (tensor === undefined) return this.push(-1, 0)
    const place = placeOf(tensor)
    const bytes = (tensor.offset + skipped) * elementBytes(tensor.type)
    return typeof place === 'number' ? this.push(-2, place + bytes) : this.push(this.buffer(place), bytes)
  }

  section(): Section {
    const numbers = this.#numbers.slice(0, this.#count)
    const buffers = this.#buffers === undefined ? noBuffers : [...this.#buffers.keys()]
    numbers[0] = buffers.length
    SectionWriter.#room = this.#numbers
    return { numbers, buffers }
  }

  #grow(least: number): void {
    const numbers = this.#numbers
    this.#numbers = new Float64Array(Math.max(least, 2 * numbers.length))
    this.#numbers.set(numbers)
  }
}

let loaded: Native | undefined

/**
 * The native library, loaded on first use.
 *
 * @throws LaproxError `NATIVE_MISSING` or `NATIVE_VERSION`, with what to do about it
 */
export function native(): Native {
  loaded ??= load()
  return loaded
}

function load(): Native {
  const root = fileURLToPath(new URL('..', import.meta.url))
  const platform = `${process.platform}-${process.arch}`
  const override = process.env.LAPROX_NATIVE_PATH
  const candidates =
    override === undefined || override === ''
      ? ['.cmake/Release', 'build/Release', `prebuilds/${platform}`].map((folder) => join(root, folder, 'laprox.node'))
      : [statSync(override, { throwIfNoEntry: false })?.isDirectory() ? join(override, 'laprox.node') : override]
  const require = createRequire(import.meta.url)
  const failures: string[] = []
  for (const path of candidates) {
    if (!existsSync(path)) {
      failures.push(`${path}: no such file`)
      continue
    }
    let library: Native
    try {
      library = require(path) as Native
    } catch (error) {
      failures.push(`${path}: ${error instanceof Error ? error.message : String(error)}`)
      continue
    }
    checkVersion(library, path)
    library.initialize(LaproxError)
    return library
  }
  throw new LaproxError(
    'NATIVE_MISSING',
    [
      `laprox's native library could not be loaded on ${platform} (Node ${process.version}):`,
      ...failures.map((failure) => `  ${failure}`),
      override === undefined || override === ''
        ? 'In a clone of the repository, build it: npm run build:native (needs a C++20 compiler).'
        : 'LAPROX_NATIVE_PATH is set: correct it, or unset it to use the library that comes with the package.',
      'In an installed package it is missing where there is no prebuilt binary for the platform, or where it was installed on another one:',
      'install again on this machine, or build laprox from its repository and set LAPROX_NATIVE_PATH to the laprox.node.',
    ].join('\n'),
  )
}

function checkVersion(library: Native, path: string): void {
  if (library.abiVersion === abiVersion && library.bindingVersion === bindingVersion) return
  const version = (abi: unknown, binding: unknown): string => `${String(abi)}.${String(binding)}`
  throw new LaproxError(
    'NATIVE_VERSION',
    `${path} has interface version ${version(library.abiVersion, library.bindingVersion)}; this laprox needs ` +
      `${version(abiVersion, bindingVersion)}. Build it again (npm run build:native) or install the package again` +
      `${process.env.LAPROX_NATIVE_PATH ? ', or unset LAPROX_NATIVE_PATH' : ''}.`,
  )
}
