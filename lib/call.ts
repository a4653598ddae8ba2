import { LaproxError, throwIfAborted } from './errors.js'
import { type NativeHandle, native } from './native.js'

/** What every asynchronous call takes. */
export interface CallOptions {
  /**
   * Ends the call: one that waits is ended at once, one that runs within some milliseconds. It then rejects with `ABORTED`,
   * whose `cause` is the signal's reason. Only an in-place compaction whose rows are moving already runs to its end.
   */
  readonly signal?: AbortSignal | undefined
  /** Called now and then, at most 20 times a second, with the share of the work that is done, and with 1 at the end. What it throws ends the call. */
  readonly progress?: ((done: number) => void) | undefined
}

/** What a native call is given of its {@link CallOptions}. */
export interface Hooks {
  readonly progress: ((done: number) => void) | undefined
  /** Set to 1 when the call should end. */
  readonly flag: Int32Array | undefined
}

const noHooks: Hooks = { progress: undefined, flag: undefined }

/** Runs `start`, which makes native calls on a device, with what the options ask for. */
export function call<T>(device: NativeHandle, options: CallOptions | undefined, start: (hooks: Hooks) => Promise<T>): Promise<T> {
  if (options?.signal === undefined && options?.progress === undefined) return start(noHooks)
  return callWith(device, options, start)
}

async function callWith<T>(device: NativeHandle, options: CallOptions, start: (hooks: Hooks) => Promise<T>): Promise<T> {
  const { signal, progress } = options
  checkOptions(options)
  throwIfAborted(signal)
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
    const result = await start({ progress: progress === undefined ? undefined : report, flag })
    report(1)
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
export function part({ progress, flag }: Hooks, from: number, to: number): Hooks {
  return { progress: progress && ((done) => progress(from + done * (to - from))), flag }
}
