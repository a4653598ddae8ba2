import type { Hooks } from './call.js'
import { deviceNumbers, type Held, type NativeHandle, native, type Section } from './native.js'

/** One call on a GPU: stages that follow each other on a stream, and what they work on. Sections that they do not need are absent. */
export interface Work {
  /** A sum of `stage` in native.ts. */
  readonly stages: number
  readonly model?: NativeHandle
  readonly cache?: Section
  readonly window?: Section
  readonly scoreRule?: Float64Array
  readonly selectRule?: Float64Array
  readonly scores?: Section
  readonly selection?: Section
  readonly target?: Section
  /** Handles of memory that the call allocates. */
  readonly tokens?: NativeHandle
  readonly scored?: NativeHandle | undefined
  readonly rows?: NativeHandle | undefined
  readonly pageTable?: NativeHandle | undefined
  /** What a selection comes back in: see Selection. */
  readonly table?: Float64Array
  /** Pages used of each free list, or freed of each layer. */
  readonly counts?: Float64Array
  /** Ids of freed pages. */
  readonly pages?: Int32Array
  /** Whatever must not be collected while the work runs: owners of device memory. */
  readonly keep: object
}

const noTable = new Float64Array(0)
const noPages = new Int32Array(0)

/** Runs it, and gives the numbers that {@link deviceNumbers} names. */
export function startWork(device: NativeHandle, work: Work, { flag, streams }: Hooks): Promise<Float64Array> {
  const numbers = new Float64Array(deviceNumbers.count)
  const { cache, window, scores, selection, target } = work
  const held: Held<Float64Array> = [numbers, work.keep, flag]
  for (const section of [cache, window, scores, selection, target]) if (section !== undefined) for (const buffer of section.buffers) held.push(buffer)
  held.push(numbers, work.table ?? noTable, work.counts ?? noTable, work.pages ?? noPages)
  return native().enqueue(
    device,
    work.model ?? null,
    streams,
    work.stages,
    cache?.numbers ?? null,
    window?.numbers ?? null,
    work.scoreRule ?? null,
    work.selectRule ?? null,
    scores?.numbers ?? null,
    selection?.numbers ?? null,
    target?.numbers ?? null,
    [work.tokens ?? null, work.scored ?? null, work.rows ?? null, work.pageTable ?? null],
    held,
  )
}
