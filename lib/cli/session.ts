import type { Command } from 'commander'
import { type Capture, readCapture } from '../capture.js'
import { Device, type DeviceName } from '../device.js'
import { type Fidelity, fidelity } from '../fidelity.js'
import type { Selection } from '../selection.js'
import type { FloatType } from '../tensor.js'
import { readCount, readDeviceName } from './options.js'
import { bytes, count, percent } from './table.js'
import { type Terminal, watch } from './terminal.js'

/** What every command that computes takes. */
export interface DeviceOptions {
  readonly device: DeviceName
  readonly threads?: number
  readonly json?: true
}

/** For the help of commands that read a capture. */
export const captureHelp = `
A capture is a safetensors file with the metadata laprox.capture = 1 and, for each layer l,
  layers.<l>.keys, layers.<l>.values   [kvHeads, tokens, headDim], keys rotated
  layers.<l>.queries                   [queryHeads, m, headDim], the prompt's last m, rotated
  layers.<l>.output_projection         [D, queryHeads * headDim], as o_proj.weight
docs/captures.md in the repository has what else it may hold, and a script that writes one.`

/** Adds them to a command. */
export function deviceOptions(command: Command): Command {
  return command
    .option('--device <name>', 'auto (a GPU where there is one), cpu, cuda or cuda:1', readDeviceName, 'auto')
    .option('--threads <n>', 'threads of the CPU (default: one a core)', readCount)
    .option('--json', 'print JSON')
}

/** Opens the device that the options name. */
export function openDevice({ device, threads }: DeviceOptions): Promise<Device> {
  return Device.open(device, { threads })
}

/** `CPU, 2 threads, avx512` */
export function describeDevice(device: Device): string {
  const { name, threads, instructionSet } = device.info()
  return device.backend === 'cpu' ? `${name}, ${threads} ${threads === 1 ? 'thread' : 'threads'}, ${instructionSet}` : `${name}, ${instructionSet}`
}

/** A device as JSON has it. */
export function deviceFacts(device: Device): object {
  const { name, threads, instructionSet, version } = device.info()
  return { name: device.name, chip: name, threads, instructionSet, version }
}

/** A capture as JSON has it. */
export interface CaptureFacts {
  readonly file: string
  readonly model?: string
  readonly layers: number
  readonly queryHeads: number
  readonly kvHeads: number
  readonly headDim: number
  readonly tokens: number
  /** Rows of the window. */
  readonly queries: number
  readonly laterQueries: number
  readonly type: FloatType
  readonly bytes: number
}

/** A capture on a device, read for a command. */
export class Session implements Disposable {
  readonly file: string
  readonly device: Device
  readonly capture: Capture
  /** The capture in host memory, where fidelity is computed: on a CPU device the same. */
  readonly #host: Capture

  private constructor(file: string, capture: Capture, host: Capture) {
    this.file = file
    this.device = capture.model.device
    this.capture = capture
    this.#host = host
  }

  /** @throws LaproxError (as a rejection) what {@link Device.open} and {@link readCapture} throw */
  static async open(file: string, options: DeviceOptions, terminal: Terminal): Promise<Session> {
    const capture = await read(file, options, terminal)
    if (capture.model.device.backend === 'cpu') return new Session(file, capture, capture)
    try {
      return new Session(file, capture, await read(file, { ...options, device: 'cpu' }, terminal))
    } catch (error) {
      close(capture)
      throw error
    }
  }

  [Symbol.dispose](): void {
    close(this.capture)
    close(this.#host)
  }

  /** How far the output moves where a selection alone is kept: over all queries of the capture, and over the later ones. */
  async fidelity(selection: Selection, terminal: Terminal): Promise<Fidelity> {
    const { model, cache, window, later } = this.#host
    const kept = await selection.to('cpu', { signal: terminal.signal })
    return watch(terminal, 'fidelity', (hooks) => fidelity(model, cache, kept, window, { later, ...hooks }))
  }

  /** `3.1 % over the last 32 queries (layer 5: 4 %), 5 % over 16 later ones (layer 7: 8 %)` */
  describeErrors({ layers, ...all }: Fidelity): string {
    const worst = (of: 'window' | 'later'): string => {
      const errors = layers.map((layer) => layer[of] ?? 0)
      const most = Math.max(...errors)
      return layers.length > 1 ? ` (layer ${errors.indexOf(most)}: ${percent(most)})` : ''
    }
    const { queries, laterQueries } = this.facts()
    const over = `${percent(all.window)} over the last ${queries} queries${worst('window')}`
    return all.later === undefined ? over : `${over}, ${percent(all.later)} over ${laterQueries} later ones${worst('later')}`
  }

  /** What was read, as JSON has it. */
  facts(): CaptureFacts {
    const { name, model, cache, window, later } = this.capture
    return {
      file: this.file,
      ...(name === undefined ? {} : { model: name }),
      layers: model.layers,
      queryHeads: model.queryHeads,
      kvHeads: model.kvHeads,
      headDim: model.headDim,
      tokens: cache.lengths(0)[0]!,
      queries: window.queries[0]!.dims[1]!,
      laterQueries: later?.queries[0]?.dims[1] ?? 0,
      type: cache.type,
      bytes: cache.bytes,
    }
  }

  /** What was read, and where it is: rows of a table. */
  rows(): string[][] {
    const { name, model, cache } = this.capture
    const { layers, queryHeads, kvHeads, headDim } = model
    const heads = `${layers} ${layers === 1 ? 'layer' : 'layers'}, ${queryHeads} query heads, ${kvHeads} KV heads of ${headDim}`
    return [
      ['capture', [...(name === undefined ? [] : [name]), heads, `${count(cache.lengths(0)[0]!)} tokens`, cache.type, bytes(cache.bytes)].join(', ')],
      ['device', describeDevice(this.device)],
    ]
  }
}

async function read(file: string, options: DeviceOptions, terminal: Terminal): Promise<Capture> {
  const device = await openDevice(options)
  try {
    const capture = await watch(terminal, 'reading', (hooks) => readCapture(file, { device, ...hooks }))
    // What is derived from the weights once is no part of an eviction's time.
    await capture.model.ready
    return capture
  } catch (error) {
    device.dispose()
    throw error
  }
}

function close(capture: Capture): void {
  capture.dispose()
  capture.model.device.dispose()
}
