import { describe } from 'vitest'
import { type CacheState, cacheOf, stateOf } from '../../lib/cache.js'
import { Device, type Kernels, type KvCache, LaproxError, Tensor, type Window } from '../../lib/index.js'
import { elementBytes, placeOf } from '../../lib/tensor.js'

export const cpu = await Device.open('cpu')

/** The GPU with all its kernels, or why there is none. */
export const gpu: Device | string = await Device.open('cuda').catch((error: LaproxError) => error.message)
export const there = typeof gpu !== 'string'
export const device = gpu as Device
/** Whether it is test/support/cuda's emulator. */
export const emulated = there && device.info().name === 'Emulated GPU'

/** The kernels that this GPU has, each as a device of its own. */
export const paths: readonly (readonly [name: Kernels, device: Device])[] = there ? await openPaths() : [['auto', device]]

async function openPaths(): Promise<(readonly [Kernels, Device])[]> {
  const opened: (readonly [Kernels, Device])[] = []
  for (const kernels of ['plain', 'portable', 'hopper'] as const) {
    try {
      opened.push([kernels, await Device.open('cuda', { kernels })])
    } catch (error) {
      if (!(error instanceof LaproxError && error.code === 'UNSUPPORTED')) throw error
    }
  }
  return opened
}

/** Tests that are skipped, and counted as such, where there is no GPU. */
export function onGpu(name: string, tests: () => void): void {
  describe.skipIf(!there)(there ? name : `${name} (skipped: ${gpu})`, tests)
}

/** Bytes before and after everything that is copied to the GPU, of a pattern that is looked at again. */
const GUARD = 256
const PATTERN = 0xa5

/** Copies of host buffers on a GPU, each once, between guard bands. */
export class Mirror {
  readonly device: Device
  readonly #copies = new Map<ArrayBufferLike, Promise<Tensor<'uint8'>>>()

  constructor(on: Device) {
    this.device = on
  }

  async tensor<T extends Tensor>(tensor: T): Promise<T> {
    const { buffer, byteOffset } = tensor.data
    let copy = this.#copies.get(buffer)
    if (copy === undefined) {
      const bytes = new Uint8Array(buffer.byteLength + 2 * GUARD).fill(PATTERN)
      bytes.set(new Uint8Array(buffer), GUARD)
      copy = new Tensor('uint8', bytes, [bytes.length]).to(this.device)
      this.#copies.set(buffer, copy)
    }
    const pointer = (await copy).pointer + BigInt(GUARD + byteOffset)
    const layout = { strides: tensor.strides, offset: tensor.offset }
    return Tensor.fromDevicePointer(this.device, tensor.type, pointer, tensor.dims, layout) as unknown as T
  }

  /** Which buffers have changed: those on the host are what they were. Throws where a guard band has. */
  async changed(): Promise<ArrayBufferLike[]> {
    const changed: ArrayBufferLike[] = []
    for (const [buffer, copy] of this.#copies) {
      const now = await (await copy).getData()
      for (const [from, to] of [
        [0, GUARD],
        [now.length - GUARD, now.length],
      ] as const) {
        for (let i = from; i < to; i++)
          if (now[i] !== PATTERN) throw new Error(`a guard band has changed at byte ${i - GUARD} of ${buffer.byteLength}`)
      }
      if (Buffer.compare(now.subarray(GUARD, now.length - GUARD), new Uint8Array(buffer)) !== 0) changed.push(buffer)
    }
    return changed
  }

  /** Gives the copies back. */
  async dispose(): Promise<void> {
    for (const copy of this.#copies.values()) (await copy).dispose()
  }
}

const planes = ['keys', 'values', 'positions', 'valueNorms', 'tables'] as const

async function moved(cache: KvCache, on: Device, move: (tensor: Tensor) => Promise<Tensor>): Promise<KvCache> {
  const { state } = stateOf(cache)
  const next: { -readonly [K in keyof CacheState]: CacheState[K] } = { ...state }
  delete next.owned
  for (const name of planes) {
    const list = state[name]
    if (list !== undefined) next[name] = await Promise.all(list.map(move))
  }
  return cacheOf(on, next)
}

/** A cache of the host on a GPU, memory as it lies there. */
export const toGpu = (cache: KvCache, mirror: Mirror): Promise<KvCache> => moved(cache, mirror.device, (tensor) => mirror.tensor(tensor))

/** A cache on a GPU in host memory. */
export async function toHost(cache: KvCache): Promise<KvCache> {
  const known = new Map<string, Promise<Tensor>>()
  return moved(cache, cpu, (tensor) => {
    const place = placeOf(tensor)
    if (typeof place !== 'number') return Promise.resolve(tensor)
    const key = [place + tensor.offset * elementBytes(tensor.type), ...tensor.dims, ...tensor.strides].join()
    const copy = known.get(key) ?? tensor.to('cpu')
    known.set(key, copy)
    return copy
  })
}

export async function windowToGpu(window: Window, mirror: Mirror): Promise<Window> {
  const all = (list: readonly Tensor[]): Promise<Tensor[]> => Promise.all(list.map((tensor) => mirror.tensor(tensor)))
  return {
    queries: await all(window.queries),
    ...(window.logSumExp === undefined ? {} : { logSumExp: await all(window.logSumExp), logSumExpBase: window.logSumExpBase }),
  }
}

/** Runs checks, and says in what they failed. */
export async function attempt(what: string, checks: () => Promise<void>): Promise<void> {
  try {
    await checks()
  } catch (error) {
    if (error instanceof Error) error.message = `${what}: ${error.message}`
    throw error
  }
}
