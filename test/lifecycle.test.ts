import { spawn } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import { describe, expect, it } from 'vitest'
import { AttentionModel, compact, Device, evict, KvCache, policies, Scores, Selection, score, select, selectFrom, Tensor } from '../lib/index.js'

const script = (name: string): string => fileURLToPath(new URL(`support/${name}.mjs`, import.meta.url))

/** Sanitizers are preloaded: see scripts/sanitize.mjs. */
const SANITIZED = process.env.LD_PRELOAD !== undefined

/** Milliseconds that ending may take on a busy machine; it takes some tens. */
const DEADLINE = SANITIZED ? 300_000 : 20_000

function within<T>(promise: Promise<T>, what: string): Promise<T> {
  let timer: NodeJS.Timeout
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: not within ${DEADLINE} ms`)), DEADLINE)
  })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

interface Outcome {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly output: string
}

function run(task: string, ...flags: string[]): Promise<Outcome> {
  const child = spawn(process.execPath, [...flags, script('child'), task], { stdio: ['ignore', 'pipe', 'pipe'] })
  let output = ''
  for (const stream of [child.stdout, child.stderr]) stream.setEncoding('utf8').on('data', (text: string) => (output += text))
  const ended = new Promise<Outcome>((resolve) => child.on('close', (code, signal) => resolve({ code, signal, output })))
  return within(ended, `child process, ${task}`).finally(() => child.kill('SIGKILL'))
}

function startWorker(task: string): { worker: Worker; message: Promise<unknown>; exit: Promise<number> } {
  const worker = new Worker(script('worker'), { workerData: { task } })
  const exit = new Promise<number>((resolve) => worker.once('exit', resolve))
  const message = new Promise<unknown>((resolve, reject) => {
    worker.once('message', resolve)
    worker.once('error', reject)
  })
  return { worker, message, exit }
}

describe('worker threads', () => {
  it('load, use and leave, several at a time', async () => {
    const workers = Array.from({ length: 4 }, () => startWorker('use'))
    const kept = await within(Promise.all(workers.map(({ message }) => message)), 'workers')
    expect(kept).toEqual([400, 400, 400, 400])
    expect(await within(Promise.all(workers.map(({ exit }) => exit)), 'their exit')).toEqual([0, 0, 0, 0])
  })

  it('can be terminated in mid-work', async () => {
    const workers = Array.from({ length: 2 }, () => startWorker('work'))
    await within(Promise.all(workers.map(({ message }) => message)), 'workers')
    await within(Promise.all(workers.map(({ worker }) => worker.terminate())), 'termination')
    // The library is as good as new.
    const again = startWorker('use')
    expect(await within(again.message, 'another worker')).toBe(400)
    await within(again.exit, 'its exit')
  })

  it('can exit in mid-work', async () => {
    expect(await within(startWorker('exit').exit, 'exit')).toBe(3)
  })
})

describe('a process', () => {
  it('can exit in mid-work', async () => {
    expect(await run('exit')).toEqual({ code: 7, signal: null, output: '' })
  })

  it('can fail in mid-work', async () => {
    const { code, signal, output } = await run('throw')
    expect({ code, signal }).toEqual({ code: 1, signal: null })
    expect(output).toContain('thrown in mid-work')
  })

  it('lives until its calls are done', async () => {
    expect(await run('wait')).toEqual({ code: 0, signal: null, output: 'kept 1600\n' })
  })

  it('is not kept alive by a device', async () => {
    expect(await run('idle')).toEqual({ code: 0, signal: null, output: 'idle\n' })
  })

  it('collects what nobody has disposed of', { skip: process.platform !== 'linux' }, async () => {
    expect(await run('collect', '--expose-gc')).toEqual({ code: 0, signal: null, output: 'grew shrank\n' })
  })

  it('keeps what running calls use', async () => {
    expect(await run('drop', '--expose-gc')).toEqual({ code: 0, signal: null, output: 'scored 8000\n' })
  })

  it('lets a cache go that an eviction has replaced', async () => {
    expect(await run('release', '--expose-gc')).toMatchObject({ code: 0, output: expect.stringMatching(/^released \d+\n$/) })
  })

  it('lets a device go while models are made', async () => {
    expect(await run('models')).toEqual({ code: 0, signal: null, output: 'created\n' })
  })
})

const HEADS = { queryHeads: 16, kvHeads: 2, headDim: 64 }

/** Scoring 60,000 tokens takes hundreds of milliseconds, 600 next to nothing. */
async function setUp(length: number) {
  const device = await Device.open('cpu', { threads: 2 })
  const tensor = (...dims: number[]): Tensor<'float32'> => {
    const size = dims.reduce((a, b) => a * b)
    return new Tensor('float32', new Float32Array(size).fill(0.25), dims)
  }
  const model = AttentionModel.create(device, { layers: 1, ...HEADS, outputProjections: [tensor(64, 16 * 64)] })
  const keys = [tensor(2, length, 64)]
  const values = [tensor(2, length, 64)]
  const cache = KvCache.from(device, { keys, values })
  const window = { queries: [tensor(16, 64, 64)] }
  return { device, model, cache, window, keys, values, policy: policies.laprox({ keep: 0.1, window: 64, sinks: 0, recent: 0 }) }
}

const SHORT = 600
const LONG = SANITIZED ? 6000 : 60_000

describe('disposal', () => {
  it('lets running calls end and refuses new ones', async () => {
    const { device, model, cache, window, keys, policy } = await setUp(LONG)
    const running = score(model, cache, window, policy)
    const queued = evict(model, cache, window, policy)
    for (const object of [device, model, cache, keys[0]!]) {
      expect(object.disposed).toBe(false)
      object.dispose()
      object[Symbol.dispose]()
      expect(object.disposed).toBe(true)
    }
    const disposed = { name: 'LaproxError', code: 'DISPOSED' }
    await expect(score(model, cache, window, policy)).rejects.toMatchObject(disposed)
    await expect(selectFrom(model, cache, window, policy)).rejects.toMatchObject(disposed)
    await expect(evict(model, cache, window, policy)).rejects.toMatchObject(disposed)
    expect(() => AttentionModel.create(device, { layers: 1, ...HEADS })).toThrowError(expect.objectContaining(disposed))
    expect(() => cache.lengths(0)).toThrowError(expect.objectContaining(disposed))
    expect((await running).data).toHaveLength(2 * LONG)
    const { report, cache: kept } = await queued
    expect(report.kept).toBe(0.1 * 2 * LONG)
    expect(kept.lengths(0)).toHaveLength(2)
    await expect(compact(kept, (await queued).selection)).rejects.toMatchObject(disposed)
    expect(device.info().backend).toBe('cpu')
  })

  it('of a tensor makes its cache unusable', async () => {
    const { device, model, cache, window, values, policy } = await setUp(SHORT)
    values[0]!.dispose()
    await expect(score(model, cache, window, policy)).rejects.toMatchObject({ code: 'DISPOSED' })
    device.dispose()
  })

  it('of a model alone leaves the device', async () => {
    const { device, model, cache, window, policy } = await setUp(SHORT)
    const running = score(model, cache, window, policy)
    model.dispose()
    await expect(score(model, cache, window, policy)).rejects.toMatchObject({ code: 'DISPOSED' })
    const { length } = (await running).data
    const selection = await select(await running, policy, { device })
    expect(selection.entries).toBe(length / 10)
    device.dispose()
  })
})

describe('an aborted signal', () => {
  const reason = new Error('changed my mind')
  const aborted = { name: 'LaproxError', code: 'ABORTED', cause: reason }

  it('refuses calls that have not begun', async () => {
    const { device, model, cache, window, policy } = await setUp(SHORT)
    const signal = AbortSignal.abort(reason)
    const scores = await score(model, cache, window, policy)
    const selection = await select(scores, policy, { device })
    await expect(score(model, cache, window, policy, { signal })).rejects.toMatchObject(aborted)
    await expect(select(scores, policy, { device, signal })).rejects.toMatchObject(aborted)
    await expect(selectFrom(model, cache, window, policy, { signal })).rejects.toMatchObject(aborted)
    await expect(compact(cache, selection, { signal })).rejects.toMatchObject(aborted)
    await expect(evict(model, cache, window, policy, { signal })).rejects.toMatchObject(aborted)
    device.dispose()
  })

  it('ends the call that runs and those that wait, and nothing else', async () => {
    const { device, model, cache, window, policy } = await setUp(LONG)
    await model.ready
    const full = performance.now()
    await score(model, cache, window, policy)
    const whole = performance.now() - full
    const controller = new AbortController()
    const running = score(model, cache, window, policy, { signal: controller.signal })
    const other = score(model, cache, window, policy)
    const waiting = evict(model, cache, window, policy, { signal: controller.signal })
    const settled: string[] = []
    const note = (name: string) => () => void settled.push(name)
    for (const [name, call] of [
      ['running', running],
      ['other', other],
      ['waiting', waiting],
    ] as const)
      call.then(note(name), note(name))
    await new Promise((resolve) => setTimeout(resolve, whole / 10))
    const start = performance.now()
    controller.abort(reason)
    await expect(waiting).rejects.toMatchObject(aborted)
    await expect(running).rejects.toMatchObject(aborted)
    expect(performance.now() - start).toBeLessThan(whole / 2)
    expect((await other).data).toHaveLength(2 * LONG)
    expect(settled.slice(0, 2).sort()).toEqual(['running', 'waiting']) // both at once, in either order
    expect(settled.slice(2)).toEqual(['other'])
    device.dispose()
  })

  it('counts until a call settles, also where its work is done, but for rows that have moved in place', async () => {
    const { device, model, cache, window, keys, values, policy } = await setUp(SHORT)
    const positions = new Tensor('int32', new Int32Array(2 * SHORT), [2, SHORT])
    for (let i = 0; i < 2 * SHORT; i++) positions.data[i] = i % SHORT
    const positioned = KvCache.from(device, { keys, values, positions: [positions], contextLengths: [SHORT] })
    const last = Selection.from({ layers: 1, kvHeads: 2, tokens: Int32Array.of(SHORT - 1, SHORT - 1), counts: [1, 1] })
    await model.ready
    const controller = new AbortController()
    const { signal } = controller
    const calls = [
      score(model, cache, window, policy, { signal }),
      selectFrom(model, cache, window, policy, { signal }),
      evict(model, cache, window, policy, { signal }),
      compact(cache, last, { signal }),
    ]
    const moving = compact(positioned, last, { target: 'in-place', signal })
    // A thread of its own does the work, call after call, and this one learns of it when its event loop turns.
    const start = performance.now()
    while (positions.data[0] === 0 && performance.now() < start + DEADLINE);
    controller.abort(reason)
    for (const outcome of await Promise.allSettled<unknown>(calls)) expect(outcome).toMatchObject({ status: 'rejected', reason: aborted })
    expect([...(await moving).lengths(0)]).toEqual([1, 1])
    expect(positions.data[0]).toBe(SHORT - 1)
    device.dispose()
  })

  it('after the call is of no matter', async () => {
    const { device, model, cache, window, policy } = await setUp(SHORT)
    const controller = new AbortController()
    const { data } = await score(model, cache, window, policy, { signal: controller.signal })
    controller.abort(reason)
    expect(data).toHaveLength(2 * SHORT)
    device.dispose()
  })
})

describe('progress', () => {
  it('rises to 1', async () => {
    const { device, model, cache, window, policy } = await setUp(LONG)
    for (const exhaustive of [false, true]) {
      const seen: number[] = []
      await evict(model, cache, window, policy, { exhaustive, progress: (done) => seen.push(done) })
      expect(seen).toEqual([...seen].sort((a, b) => a - b))
      expect(seen[0]).toBeGreaterThanOrEqual(0)
      expect(seen.at(-1)).toBe(1)
    }
    device.dispose()
  })

  it('that throws ends the call', async () => {
    const { device, model, cache, window, policy } = await setUp(LONG)
    const error = new Error('no more')
    const progress = (): void => {
      throw error
    }
    await expect(score(model, cache, window, policy, { progress })).rejects.toBe(error)
    device.dispose()
  })

  it('that throws when all is done rejects the call as well', async () => {
    const { device, model, cache, window, policy } = await setUp(SHORT)
    const error = new Error('no more')
    const progress = (done: number): void => {
      if (done === 1) throw error
    }
    await expect(score(model, cache, window, policy, { progress })).rejects.toBe(error)
    device.dispose()
  })
})

describe('a buffer that is detached', () => {
  const detached = { name: 'LaproxError', code: 'DETACHED' }
  /** Keeps the memory: what native code still reads must not go. */
  const transfer = (array: { readonly buffer: ArrayBufferLike }): unknown =>
    structuredClone(array.buffer, { transfer: [array.buffer as ArrayBuffer] })

  it('while a call runs fails that call and all later ones', async () => {
    const { device, model, cache, window, keys, policy } = await setUp(LONG)
    const running = score(model, cache, window, policy)
    const memory = transfer(keys[0]!.data)
    await expect(running).rejects.toMatchObject(detached)
    await expect(score(model, cache, window, policy)).rejects.toMatchObject(detached)
    await expect(evict(model, cache, window, policy)).rejects.toMatchObject(detached)
    expect(memory).toBeDefined()
    device.dispose()
  })

  it('of queries, scores, a selection or a pool fails the call', async () => {
    const { device, model, cache, window, policy } = await setUp(SHORT)
    const scores = await score(model, cache, window, policy)
    const selection = await select(scores, policy, { device })
    const pool = (): Tensor => Tensor.zeros('float32', [20, 16, 64])
    const [keys, values] = [pool(), pool()]
    const memory: unknown[] = []
    const moving = compact(cache, selection, { target: 'pages', keys: [keys], values: [values], freePages: Int32Array.from(Array(20).keys()) })
    memory.push(transfer(values.data))
    await expect(moving).rejects.toMatchObject(detached)

    const many = Scores.from({ layers: 1, kvHeads: 1, lengths: [LONG], data: new Float32Array(LONG) })
    const ranking = select(many, policy, { device })
    memory.push(transfer(many.data))
    await expect(ranking).rejects.toMatchObject(detached)
    await expect(select(many, policy, { device })).rejects.toMatchObject(detached)

    const ragged = compact(cache, selection)
    memory.push(transfer(selection.tokens))
    await expect(ragged).rejects.toMatchObject(detached)
    await expect(compact(cache, selection)).rejects.toMatchObject(detached)

    const scoring = score(model, cache, window, policy)
    memory.push(transfer(window.queries[0]!.data))
    await expect(scoring).rejects.toMatchObject(detached)
    await expect(score(model, cache, window, policy)).rejects.toMatchObject(detached)
    expect(memory).toHaveLength(4)
    device.dispose()
  })
})

describe('a selection of few scores', () => {
  const few = (): Scores => Scores.from({ layers: 1, kvHeads: 1, lengths: [1000], data: Float32Array.from(Array(1000).keys()) })
  const policy = policies.laprox({ keep: 0.1, sinks: 0, recent: 0 })

  it('is made at once where no other call is under way', async () => {
    const device = await Device.open('cpu', { threads: 2 })
    const scores = few()
    const selecting = select(scores, policy, { device })
    scores.data.fill(0)
    device.dispose()
    expect([...(await selecting).tokens.subarray(3)]).toEqual(Array.from({ length: 97 }, (_, i) => 903 + i))
    await expect(select(scores, policy, { device })).rejects.toMatchObject({ code: 'DISPOSED' })
  })

  it('takes its turn where others are', async () => {
    const { device, model, cache, window } = await setUp(LONG)
    await model.ready
    const ended: string[] = []
    const scoring = score(model, cache, window, policies.laprox({ keep: 0.1, window: 64 })).then(() => ended.push('scoring'))
    const selecting = select(few(), policy, { device }).then(() => ended.push('selecting'))
    const controller = new AbortController()
    const aborted = select(few(), policy, { device, signal: controller.signal })
    controller.abort()
    for (let i = 0; i < 100; i++) await undefined // what is made at once ends before the event loop turns
    expect(ended).toEqual([])
    await expect(aborted).rejects.toMatchObject({ code: 'ABORTED' })
    await Promise.all([scoring, selecting])
    expect(ended).toHaveLength(2)
    device.dispose()
  })

  it('fails by a rejection', async () => {
    const device = await Device.open('cpu', { threads: 2 })
    const scores = few()
    const selecting = select(scores, { ...policy, budget: { entries: 3 }, sinks: 4 }, { device })
    await expect(selecting).rejects.toMatchObject({ name: 'LaproxError', code: 'BUDGET_TOO_SMALL' })
    scores.data[7] = Number.NaN
    await expect(select(scores, policy, { device })).rejects.toMatchObject({ code: 'NON_FINITE' })
    await expect(select(scores, policy, { device, signal: AbortSignal.abort() })).rejects.toMatchObject({ code: 'ABORTED' })
    device.dispose()
  })
})

describe('memory that changes while a call runs', () => {
  it('cannot lead native code astray', async () => {
    const device = await Device.open('cpu', { threads: 2 })
    const pages = 4000
    const keys = [Tensor.zeros('float32', [pages, 16, 2, 8])]
    const values = [Tensor.zeros('float32', [pages, 16, 2, 8])]
    const model = AttentionModel.create(device, { layers: 1, queryHeads: 2, kvHeads: 2, headDim: 8 })
    const policy = policies.snapkv({ keep: 0.5 })
    const window = { queries: [Tensor.zeros('float32', [2, 32, 8])] }
    for (let round = 0; round < 20; round++) {
      const table = Int32Array.from(Array(pages).keys())
      const lengths = [pages * 16]
      const cache = KvCache.from(device, { keys, values, layout: 'NHD', pageTable: new Tensor('int32', table, [1, pages]), lengths })
      const evicting = evict(model, cache, window, policy)
      table.fill(2 ** 30)
      const outcome = await evicting.then(
        ({ report }) => report.kept,
        (error: { code: string }) => error.code,
      )
      expect([pages * 16, 'OUT_OF_BOUNDS']).toContain(outcome)
    }
    const scores = Scores.from({ layers: 1, kvHeads: 1, lengths: [100_000], data: new Float32Array(100_000) })
    for (let round = 0; round < 20; round++) {
      const ranking = select(scores, policies.laprox({ keep: 0.5 }), { device })
      scores.lengths.fill(2 ** 31 - 1)
      expect((await ranking).entries).toBe(50_000)
      scores.lengths.fill(100_000)
    }
    device.dispose()
  })
})
