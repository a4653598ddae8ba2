import { type Device, handleOf } from './device.js'
import { LaproxError, show } from './errors.js'
import { type Held, type NativeHandle, native } from './native.js'

/** Memory of a device: laprox's own, from the device's pool, or someone else's. Internal to lib: tensors are what users see. */
export class DeviceMemory {
  readonly device: Device
  readonly address: number
  readonly bytes: number
  /** Undefined for memory of others. The garbage collector frees what nobody has disposed of. */
  readonly #handle: NativeHandle | undefined
  #disposed = false

  constructor(device: Device, address: number, bytes: number, handle?: NativeHandle) {
    this.device = device
    this.address = address
    this.bytes = bytes
    this.#handle = handle
  }

  get disposed(): boolean {
    return this.#disposed
  }

  /** Gives it back once the calls that are under way have ended. */
  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    if (this.#handle !== undefined) native().freeMemory(this.#handle)
  }
}

/** What a native copy or allocation is given of a call's options. */
interface Where {
  readonly flag: Int32Array | undefined
  readonly streams: Float64Array
}

/** New memory, in the order of the call's stream. Nothing is written to it. */
export async function allocateOn(device: Device, bytes: number, { flag, streams }: Where): Promise<DeviceMemory> {
  const handle: NativeHandle = {}
  const address = new Float64Array(1)
  await native().allocateMemory(handleOf(device), streams, handle, bytes, [undefined, undefined, flag, address])
  return new DeviceMemory(device, address[0]!, bytes, handle)
}

/** A copy of a typed array. */
export async function copyTo(device: Device, data: ArrayBufferView, { flag, streams }: Where): Promise<DeviceMemory> {
  const handle: NativeHandle = {}
  const address = new Float64Array(1)
  await native().upload(handleOf(device), streams, handle, data.byteLength, [undefined, undefined, flag, address, data])
  return new DeviceMemory(device, address[0]!, data.byteLength, handle)
}

/** Copies a typed array into memory that is there. */
export async function copyInto(memory: DeviceMemory, offset: number, data: ArrayBufferView, { flag, streams }: Where): Promise<void> {
  const held: Held<object> = [memory, undefined, flag, new Float64Array(1), data]
  await native().upload(handleOf(memory.device), streams, memory.address + offset, data.byteLength, held)
}

/** A copy in host memory; of large ones, page-locked memory that lives as long as the buffer. */
export async function copyFrom(memory: DeviceMemory, offset: number, bytes: number, { flag, streams }: Where): Promise<ArrayBuffer> {
  const result: { data?: ArrayBuffer } = {}
  await native().download(handleOf(memory.device), streams, memory.address + offset, bytes, [result, memory, flag])
  return result.data!
}

/** A pointer of an engine, as a number that is exact. */
export function checkPointer(pointer: unknown, at: string, alignment: number): number {
  if (typeof pointer !== 'bigint' || pointer <= 0n || pointer > BigInt(Number.MAX_SAFE_INTEGER)) {
    throw new LaproxError('INVALID_ARGUMENT', `${at} is ${show(pointer)}; expected an address of the device as a bigint, above 0 and below 2^53`)
  }
  const address = Number(pointer)
  if (address % alignment !== 0) {
    throw new LaproxError('INVALID_ARGUMENT', `${at} is 0x${pointer.toString(16)}; expected a multiple of ${alignment}, the bytes of an element`)
  }
  return address
}

const cacheLine = 64
/** Bytes from which on it matters where an array lies. */
const large = 1 << 22

interface ArrayType<T> {
  new (buffer: ArrayBuffer, byteOffset: number, length: number): T
  readonly BYTES_PER_ELEMENT: number
}

/**
 * A typed array in memory that `allocate` finds for it, of which nothing has been written. A large one begins at a cache line, and lies on huge
 * pages where the system gives them.
 */
export function arrayIn<T>(array: ArrayType<T>, length: number, allocate: (bytes: number) => ArrayBuffer): T {
  const bytes = length * array.BYTES_PER_ELEMENT
  if (bytes < large) return new array(allocate(bytes), 0, length)
  const buffer = allocate(bytes + cacheLine)
  return new array(buffer, placeIn(buffer), length)
}

/** Where in a buffer to begin. Without the native library anywhere will do: whatever needs that says so. */
function placeIn(buffer: ArrayBuffer): number {
  try {
    return native().settle(buffer)
  } catch {
    return 0
  }
}
