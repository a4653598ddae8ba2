import { integer, wrong } from './check.js'
import { LaproxError, show, suggest } from './errors.js'
import { type NativeHandle, native } from './native.js'

/** `auto` is the first CUDA device where there is one, and else the CPU. */
export type DeviceName = 'auto' | 'cpu' | 'cuda' | `cuda:${number}`

/** Which kernels a CUDA device uses. */
export type Kernels = 'auto' | 'plain' | 'portable' | 'hopper'

/**
 * The vector instructions of a CPU device: `baseline` is SSE2 on x86-64 and NEON on arm64, `amx` is AVX-512 with matrix instructions for logits, on
 * Linux, `avx512bf16` AVX-512 with instructions for logits of bfloat16, which `auto` takes on AMD's processors alone: Intel's are faster without.
 * Results may differ between them in the last bits.
 */
export type InstructionSet = 'auto' | 'baseline' | 'avx2' | 'avx512' | 'amx' | 'avx512bf16'

/** What {@link Device.open} takes. Options of the other backend are ignored. */
export interface DeviceOptions {
  /** CPU: worker threads. Default: one a core. Results do not depend on it, to the bit. */
  readonly threads?: number | undefined
  /** CPU: default `auto`, the best that the machine has. One that it lacks is `UNSUPPORTED`. */
  readonly instructionSet?: InstructionSet | undefined
  /**
   * CUDA, for tests and comparisons: `plain` serves any shape on any GPU, `portable` is for every GPU of compute capability 8.0 and
   * newer, `hopper` for 9.0. Default `auto`, the fastest. One of another chip is `UNSUPPORTED`.
   */
  readonly kernels?: Kernels | undefined
}

/** Whether a backend can be used here, and why not. */
export interface BackendInfo {
  /** Which. */
  readonly backend: 'cpu' | 'cuda'
  /** Whether it can be used here. */
  readonly available: boolean
  /** Its devices; 0 where it is not available. */
  readonly deviceCount: number
  /** Where it is not available: NOT_BUILT, NO_DRIVER, DRIVER_TOO_OLD, NO_DEVICE or ABI_MISMATCH. */
  readonly code?: string
  /** A sentence, where it is not available. */
  readonly reason?: string
}

/** What a device is. */
export interface DeviceInfo {
  /** The kind of device. */
  readonly backend: 'cpu' | 'cuda'
  /** Which of the backend's devices. */
  readonly index: number
  /** "CPU", or the GPU's name. */
  readonly name: string
  /** Worker threads. */
  readonly threads: number
  /** "baseline", "avx2", "avx512", "amx", "avx512bf16"; of a GPU "sm_90" and so on. */
  readonly instructionSet: string
  /** Of the device; 0 where unknown. */
  readonly memoryBytes: number
  /** Of the native library. */
  readonly version: string
  /** All backends: why `auto` did not choose CUDA stands here. */
  readonly backends: readonly BackendInfo[]
}

const backendNames = ['cpu', 'cuda'] as const
const kernelNames: readonly Kernels[] = ['auto', 'plain', 'portable', 'hopper']
const instructionSets: readonly InstructionSet[] = ['auto', 'baseline', 'avx2', 'avx512', 'amx', 'avx512bf16']

/** The handle of a device; throws `DISPOSED`, or `INVALID_ARGUMENT` for what is none. */
export let handleOf: (device: Device) => NativeHandle
/** Holds a device open until the call that it gives back, so that a call of several steps can end after a disposal. */
export let lease: (device: Device) => () => void

/**
 * A processor with its own threads, or a GPU. Calls on a CPU device run one after the other, off the JavaScript thread, which does
 * itself what takes less time than to ask another: see {@link select}. Calls on different devices run at the same time. Calls on a GPU are put on their stream by a thread of the device, in the order they
 * were made, soon after they return: what the caller puts on the stream is ordered after a call once its promise is fulfilled.
 * No thread waits for the GPU. Dispose of a device when done: the garbage collector is only a safety net.
 *
 *     using device = await Device.open('auto')
 *     console.log(device.info())
 */
export class Device implements Disposable {
  readonly #handle: NativeHandle
  readonly #info: DeviceInfo
  #disposed = false
  #leases = 0

  private constructor(handle: NativeHandle) {
    this.#handle = handle
    const [backend, index, threads, memoryBytes, name, instructionSet] = native().deviceInfo(handle)
    const { version } = native()
    this.#info = Object.freeze({
      backend: backendNames[backend]!,
      index,
      name,
      threads,
      instructionSet,
      memoryBytes,
      version,
      backends: Object.freeze(backendNames.map(backendInfo)),
    })
  }

  static {
    handleOf = (device) => {
      if (!(device instanceof Device)) throw wrong('device', device, 'a Device')
      if (device.#disposed) throw new LaproxError('DISPOSED', 'the device was used after its disposal')
      return device.#handle
    }
    lease = (device) => {
      device.#leases++
      return () => {
        device.#leases--
        device.#close()
      }
    }
  }

  /**
   * Opens a device.
   *
   * @param name `auto` falls back to the CPU, and {@link Device.info} says why
   * @throws LaproxError (as a rejection) `INVALID_ARGUMENT` for an unknown name or option, `NO_DEVICE` where a device that was asked
   *   for by name is not there, `UNSUPPORTED` for instructions that the machine lacks, `NATIVE_MISSING`, `NATIVE_VERSION`
   */
  static async open(name: DeviceName = 'auto', options: DeviceOptions = {}): Promise<Device> {
    const cuda = /^cuda(?::(\d{1,4}))?$/.exec(String(name))
    if (name !== 'auto' && name !== 'cpu' && cuda === null) {
      throw new LaproxError('INVALID_ARGUMENT', `name is ${show(name)}; ${suggest(name, ['auto', 'cpu', 'cuda', 'cuda:0'])}`)
    }
    if (typeof options !== 'object' || options === null) throw wrong('options', options, 'an object')
    const threads = options.threads === undefined ? 0 : integer(options.threads, 'options.threads', 1, 1024)
    const instructionSet = options.instructionSet ?? 'auto'
    const isa = instructionSets.indexOf(instructionSet)
    if (isa < 0) {
      throw new LaproxError('INVALID_ARGUMENT', `options.instructionSet is ${show(instructionSet)}; ${suggest(instructionSet, instructionSets)}`)
    }
    const chosen = options.kernels ?? 'auto'
    const kernels = kernelNames.indexOf(chosen)
    if (kernels < 0) throw new LaproxError('INVALID_ARGUMENT', `options.kernels is ${show(chosen)}; ${suggest(chosen, kernelNames)}`)
    const open = async (backend: number, index: number): Promise<Device> =>
      new Device(await native().openDevice(backend, index, threads, isa, kernels, [{}, undefined, undefined]))
    if (cuda !== null) return open(1, Number(cuda[1] ?? 0))
    if (name === 'auto' && native().backendInfo(1)[0]) {
      try {
        return await open(1, 0)
      } catch (error) {
        // A GPU that is there but cannot be opened, say for lack of memory.
        if (!(error instanceof LaproxError)) throw error
      }
    }
    return open(0, 0)
  }

  /** The kind of device. */
  get backend(): 'cpu' | 'cuda' {
    return this.#info.backend
  }

  /** Its name as {@link Device.open} takes it: "cpu", "cuda:0". */
  get name(): string {
    const { backend, index } = this.#info
    return backend === 'cpu' ? backend : `${backend}:${index}`
  }

  /**
   * Why a GPU can no longer be used: CUDA's name for an error that has made its context unusable, which lasts until the process
   * ends. Undefined while it can be used. Calls under way at that time have rejected with `DEVICE_ERROR`, and so do new ones.
   */
  get lost(): string | undefined {
    const why = native().deviceLost(this.#handle)
    return why === '' ? undefined : why
  }

  /** What the device is, and which backends there are; also after its disposal. */
  info(): DeviceInfo {
    return this.#info
  }

  /**
   * Lets go of the device's threads and memory. Calls under way run to their end, and it closes after the last one; new
   * calls are an error. Doing it twice is not.
   */
  dispose(): void {
    this.#disposed = true
    this.#close()
  }

  /** What `using` calls: {@link Device.dispose}. */
  [Symbol.dispose](): void {
    this.dispose()
  }

  /** Whether it has been disposed of. */
  get disposed(): boolean {
    return this.#disposed
  }

  #close(): void {
    if (this.#disposed && this.#leases === 0) native().closeDevice(this.#handle)
  }
}

function backendInfo(backend: 'cpu' | 'cuda'): BackendInfo {
  const [available, deviceCount, code, reason] = native().backendInfo(backendNames.indexOf(backend))
  return Object.freeze(available ? { backend, available, deviceCount } : { backend, available, deviceCount, code, reason })
}

let shared: Promise<Device> | undefined

/** The CPU device for calls that name none: opened by the first of them, and there until the process ends. */
export function sharedDevice(): Promise<Device> {
  shared ??= Device.open('cpu').catch((error: unknown) => {
    shared = undefined
    throw error
  })
  return shared
}
