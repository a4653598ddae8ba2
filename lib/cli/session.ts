import type { Command } from 'commander'
import { type Capture, readCapture } from '../capture.js'
import { Device, type DeviceName } from '../device.js'
import { readCount, readDeviceName } from './options.js'
import { bytes, count } from './table.js'
import { type Terminal, watch } from './terminal.js'

/** What every command that computes takes. */
export interface DeviceOptions {
  readonly device: DeviceName
  readonly threads?: number
  readonly json?: true
}

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

/** A capture on a device, read for a command. */
export class Session implements Disposable {
  readonly file: string
  readonly device: Device
  readonly capture: Capture

  private constructor(file: string, device: Device, capture: Capture) {
    this.file = file
    this.device = device
    this.capture = capture
  }

  /** @throws LaproxError (as a rejection) what {@link Device.open} and {@link readCapture} throw */
  static async open(file: string, options: DeviceOptions, terminal: Terminal): Promise<Session> {
    const device = await openDevice(options)
    try {
      const capture = await watch(terminal, 'reading', (hooks) => readCapture(file, { device, ...hooks }))
      // What is derived from the weights once is no part of an eviction's time.
      await capture.model.ready
      return new Session(file, device, capture)
    } catch (error) {
      device.dispose()
      throw error
    }
  }

  [Symbol.dispose](): void {
    this.capture.dispose()
    this.device.dispose()
  }

  /** What was read, as JSON has it. */
  facts(): object {
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
