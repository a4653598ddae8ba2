import { type Device, handleOf } from './device.js'
import { LaproxError, show, throwIfAborted } from './errors.js'
import { checkPointer } from './memory.js'
import { native } from './native.js'

/** What every asynchronous call takes. */
export interface CallOptions {
  /**
   * Ends the call: one that waits is ended at once, one that runs within some milliseconds. It then rejects with `ABORTED`,
   * whose `cause` is the signal's reason, also where its work was done by then but its promise not settled. Only an in-place
   * compaction whose rows are moving already runs to its end.
   * On a GPU the promise rejects at once, and work that is on a stream already runs out: until then the call holds its memory,
   * and what it would have written to (pages of a pool) may still be written to.
   */
  readonly signal?: AbortSignal | undefined
  /** Called now and then, at most 20 times a second, with the share of the work that is done, and with 1 at the end. What it throws ends the call, which rejects with it. */
  readonly progress?: ((done: number) => void) | undefined
  /**
   * GPU: the `cudaStream_t` that everything is put on, or one of CUDA's two default streams by name. Default: the device's own,
   * which is ordered with no other: use events, or await the call.
   */
  readonly stream?: bigint | 'legacy' | 'perThread' | undefined
  /** GPU: a `cudaEvent_t` that the stream waits for first. It has been recorded before. */
  readonly waitEvent?: bigint | undefined
  /** GPU: a `cudaEvent_t` to record at the end; it has been by the time the promise is fulfilled. */
  readonly recordEvent?: bigint | undefined
}

/** What a native call is given of its {@link CallOptions}. */
export interface Hooks {
  readonly progress: ((done: number) => void) | undefined
  /** Set to 1 when the call should end. */
  readonly flag: Int32Array | undefined
  /** Stream, event to wait for, event to record. */
  readonly streams: Float64Array
}

/** The device's own stream, no events. */
const noStreams = new Float64Array(3)
/** Of a call without options. */
export const noHooks: Hooks = { progress: undefined, flag: undefined, streams: noStreams }

/** Runs `start`, which makes native calls on a device, with what the options ask for. */
export function call<T>(device: Device, options: CallOptions | undefined, start: (hooks: Hooks) => Promise<T>): Promise<T> {
  return asksNothing(options) ? start(noHooks) : callWith(device, options!, start)
}

/** Whether the options leave a call as it is. */
export function asksNothing(options: CallOptions | undefined): boolean {
  return options === undefined || (options.signal === undefined && options.progress === undefined && !streamed(options))
}

function streamed({ stream, waitEvent, recordEvent }: CallOptions): boolean {
  return stream !== undefined || waitEvent !== undefined || recordEvent !== undefined
}

async function callWith<T>(owner: Device, options: CallOptions, start: (hooks: Hooks) => Promise<T>): Promise<T> {
  const { signal, progress } = options
  checkOptions(options)
  const streams = streamed(options) ? streamsOf(owner, options) : noStreams
  if (signal === undefined && progress === undefined) return start({ ...noHooks, streams })
  throwIfAborted(signal)
  const device = handleOf(owner)
  const flag = new Int32Array(new SharedArrayBuffer(4))
  const end = (): void => {
    Atomics.store(flag, 0, 1)
    native().sweep(device)
  }
  let thrown: { readonly error: unknown } | undefined
  const report = (done: number): void => {
    if (thrown !== undefined) return
    try {
      progress?.(done)
    } catch (error) {
      thrown = { error }
      end()
    }
  }
  signal?.addEventListener('abort', end, { once: true })
  try {
    const result = await start({ progress: progress === undefined ? undefined : report, flag, streams })
    report(1)
    if (thrown !== undefined) throw thrown.error // too late to end the work
    return result
  } catch (error) {
    if (signal?.aborted && error instanceof LaproxError && error.code === 'ABORTED') throwIfAborted(signal)
    throw thrown === undefined ? error : thrown.error
  } finally {
    signal?.removeEventListener('abort', end)
  }
}

function checkOptions({ signal, progress }: CallOptions): void {
  if (signal !== undefined && !(signal instanceof AbortSignal)) {
    throw new LaproxError('INVALID_ARGUMENT', `options.signal is a ${typeof signal}; expected an AbortSignal`)
  }
  if (progress !== undefined && typeof progress !== 'function') {
    throw new LaproxError('INVALID_ARGUMENT', `options.progress is a ${typeof progress}; expected a function`)
  }
}

/** The hooks of a part of a call: its progress goes from `from` to `to`. */
export function part({ progress, flag, streams }: Hooks, from: number, to: number): Hooks {
  return { progress: progress && ((done) => progress(from + done * (to - from))), flag, streams }
}

/** CUDA's names for its default streams are the pointers 1 and 2. */
const namedStreams = { legacy: 1, perThread: 2 } as const

function streamsOf(device: Device, { stream, waitEvent, recordEvent }: CallOptions): Float64Array {
  if (device.backend !== 'cuda') {
    throw new LaproxError('INVALID_ARGUMENT', `options has a stream or an event, which CUDA devices alone have; this call is on ${device.name}`)
  }
  return Float64Array.of(
    streamOf(stream),
    waitEvent === undefined ? 0 : checkPointer(waitEvent, 'options.waitEvent', 1),
    recordEvent === undefined ? 0 : checkPointer(recordEvent, 'options.recordEvent', 1),
  )
}

function streamOf(stream: unknown): number {
  if (stream === undefined) return 0
  if (stream === 'legacy' || stream === 'perThread') return namedStreams[stream]
  if (typeof stream === 'bigint' && stream > 0n && stream <= BigInt(Number.MAX_SAFE_INTEGER)) return Number(stream)
  const hint = stream === 0n ? ": stream 0 is CUDA's default stream, which is 'legacy' or 'perThread'" : ''
  throw new LaproxError('INVALID_ARGUMENT', `options.stream is ${show(stream)}; expected a cudaStream_t as a bigint, 'legacy' or 'perThread'${hint}`)
}
