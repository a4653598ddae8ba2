import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { expect, it } from 'vitest'
import {
  AttentionModel,
  compact,
  Device,
  evict,
  fidelity,
  KvCache,
  type LaproxErrorCode,
  policies,
  Scores,
  Selection,
  score,
  select,
  selectFrom,
  Tensor,
} from '../../lib/index.js'
import { Random } from '../support/random.js'
import { cpu, device, emulated, onGpu } from './gpu.js'

async function refuses(call: () => unknown, code: LaproxErrorCode, message: RegExp): Promise<void> {
  const error: unknown = await Promise.resolve()
    .then(call)
    .then(
      () => 'no error',
      (thrown: unknown) => thrown,
    )
  expect(error).toMatchObject({ name: 'LaproxError', code })
  expect((error as Error).message).toMatch(message)
}

const SHAPE = { layers: 2, queryHeads: 4, kvHeads: 2, headDim: 16 }
const floats = (random: Random, ...dims: number[]): Tensor<'float32'> =>
  new Tensor(
    'float32',
    Float32Array.from({ length: dims.reduce((a, b) => a * b, 1) }, () => random.normal()),
    dims,
  )

/** A cache of 200 tokens a head, with all that belongs to it. */
async function setUp(on = device) {
  const random = new Random(1)
  const two = <T>(make: () => T): Promise<Awaited<T>[]> => Promise.all([make(), make()])
  const outputProjections = [floats(random, 32, 64), floats(random, 32, 64)]
  const model = AttentionModel.create(on, { ...SHAPE, outputProjections })
  const [keys, values] = [await two(() => floats(random, 2, 200, 16).to(on)), await two(() => floats(random, 2, 200, 16).to(on))]
  const cache = KvCache.from(on, { keys, values })
  const window = { queries: await two(() => floats(random, 4, 4, 16).to(on)) }
  return { model, cache, window, keys, values, policy: policies.laprox({ keep: 0.5, window: 4 }) }
}

onGpu('a tensor on a GPU', () => {
  it('goes there and back, whatever its type and size', async () => {
    for (const size of [0, 1, 1000, 300_000]) {
      const host = new Tensor(
        'int32',
        Int32Array.from({ length: size }, (_, i) => i * 7),
        [size],
      )
      const moved = await host.to(device)
      expect(moved).toMatchObject({ location: 'cuda', type: 'int32', dims: [size], disposed: false })
      expect(moved.device).toBe(device)
      expect(await moved.to(device)).toBe(moved)
      expect(await host.to('cpu')).toBe(host)
      expect(await host.to(cpu)).toBe(host)
      expect(await moved.getData()).toEqual(host.data)
      moved.dispose()
      expect(moved.disposed).toBe(true)
      await refuses(() => moved.getData(), 'DISPOSED', /^the tensor int32/)
    }
  })

  it('keeps its strides on the way back, and is packed on the way there', async () => {
    const host = new Tensor(
      'float32',
      Float32Array.from({ length: 24 }, (_, i) => i),
      [3, 4],
      { strides: [8, 1], offset: 2 },
    )
    const there = await host.to(device)
    expect(there.strides).toEqual([4, 1])
    const view = Tensor.fromDevicePointer(device, 'float32', there.pointer, [2, 2], { strides: [8, 1], offset: 1 })
    const back = await view.to('cpu')
    expect(back.strides).toEqual([8, 1])
    expect(await view.getData()).toEqual(Float32Array.of(3, 4, 19, 20))
    expect((await there.at(1).getData())[0]).toBe(10)
    expect(there.at(2).pointer - there.pointer).toBe(32n)
  })

  it('is overwritten where it lies', async () => {
    const there = await Tensor.allocate(device, 'float32', [4, 8])
    await there.copyFrom(new Tensor('float32', new Float32Array(32).fill(1), [4, 8]))
    await there.at(2).copyFrom(new Tensor('float32', new Float32Array(8).fill(2), [8]))
    expect(await there.getData()).toEqual(Float32Array.from({ length: 32 }, (_, i) => (Math.floor(i / 8) === 2 ? 2 : 1)))
    await refuses(
      () => there.copyFrom(new Tensor('float32', new Float32Array(8), [8])),
      'INVALID_ARGUMENT',
      /^source is float32 \[8\]; expected float32 \[4, 8\]/,
    )
  })

  it('says how to get at its data', async () => {
    const there = await Tensor.allocate(device, 'float32', [4])
    await refuses(
      () => there.data,
      'DEVICE_MISMATCH',
      /is in the memory of cuda:0: copy it first, by await tensor.getData\(\) or await tensor.to\('cpu'\)/,
    )
    await refuses(() => new Tensor('float32', new Float32Array(1), [1]).pointer, 'DEVICE_MISMATCH', /in host memory; expected one on a GPU/)
  })

  it('refuses addresses, shapes and devices that cannot be', async () => {
    const at = (pointer: unknown, dims = [4]) => Tensor.fromDevicePointer(device, 'float32', pointer as bigint, dims)
    await refuses(() => at(0n), 'INVALID_ARGUMENT', /^pointer is 0n; expected an address/)
    await refuses(() => at(1 << 20), 'INVALID_ARGUMENT', /^pointer is 1048576; expected an address of the device as a bigint/)
    await refuses(() => at(2n ** 60n), 'INVALID_ARGUMENT', /below 2\^53/)
    await refuses(() => at(0x1002n), 'INVALID_ARGUMENT', /^pointer is 0x1002; expected a multiple of 4/)
    await refuses(() => at(0x1000n, [-1]), 'INVALID_ARGUMENT', /^dims\[0\]/)
    await refuses(() => Tensor.fromDevicePointer(cpu, 'float32', 4096n, [1]), 'INVALID_ARGUMENT', /^device is the CPU/)
    await refuses(() => Tensor.allocate(device, 'float32', [2 ** 46]), 'OUT_OF_MEMORY', /bytes left/)
  })
})

onGpu('a call on a GPU', () => {
  it('refuses memory of the wrong place, and says what to do', async () => {
    const { model, cache, keys, values, window, policy } = await setUp()
    const host = floats(new Random(2), 2, 200, 16)
    await refuses(
      () => KvCache.from(device, { keys, values: [host, host] }),
      'DEVICE_MISMATCH',
      /^values\[0\] is float32 \[2, 200, 16\] in host memory; expected the memory of this cuda:0: await tensor.to\(device\)/,
    )
    await refuses(
      () => KvCache.from(cpu, { keys, values }),
      'DEVICE_MISMATCH',
      /^keys\[0\] .* in the memory of cuda:0; expected host memory: await tensor.to\('cpu'\)/,
    )
    await refuses(
      () => score(model, cache, { queries: [floats(new Random(3), 4, 4, 16), floats(new Random(3), 4, 4, 16)] }, policy),
      'DEVICE_MISMATCH',
      /^queries\[0\]/,
    )
    const other = await Device.open('cuda')
    await refuses(() => KvCache.from(other, { keys, values }), 'DEVICE_MISMATCH', /^keys\[0\]/)
    other.dispose()
    const given = Scores.from({ layers: 2, kvHeads: 2, lengths: [200, 200, 200, 200], data: new Float32Array(800) })
    await refuses(() => select(given, policy, { device }), 'DEVICE_MISMATCH', /^the scores are in host memory; .* await scores.to\(device\)/)
    const selection = Selection.from({ layers: 2, kvHeads: 2, tokens: Int32Array.of(1), counts: [1, 0, 0, 0] })
    await refuses(
      () => compact(cache, selection),
      'DEVICE_MISMATCH',
      /^the tokens of the selection are in host memory; .* await selection.to\(device\)/,
    )
    const scores = await score(model, cache, window, policy)
    await refuses(() => scores.data, 'DEVICE_MISMATCH', /await scores.to\('cpu'\)/)
    await refuses(() => select(scores, policy, { device: cpu }), 'DEVICE_MISMATCH', /^the scores are in the memory of cuda:0/)
    const chosen = await select(scores, policy)
    expect(chosen.location).toBe('cuda')
    await refuses(() => chosen.tokens, 'DEVICE_MISMATCH', /await selection.to\('cpu'\)/)
    await refuses(() => chosen.kept(0, 0, 0), 'DEVICE_MISMATCH', /tokens of the selection/)
  })

  it('refuses fidelity, and says where it is computed', async () => {
    const { model, cache, window, policy } = await setUp()
    const selection = await selectFrom(model, cache, window, policy)
    await refuses(
      () => fidelity(model, cache, selection, window),
      'UNSUPPORTED',
      /^fidelity is computed on CPU devices, and the model is on .*to\('cpu'\)/,
    )
    const host = await setUp(cpu)
    const kept = await selection.to('cpu')
    await refuses(() => fidelity(host.model, cache, kept, host.window), 'DEVICE_MISMATCH', /another device than the model/)
    await refuses(() => fidelity(host.model, host.cache, selection, host.window), 'DEVICE_MISMATCH', /await selection.to\('cpu'\)/)
    await refuses(() => fidelity(host.model, host.cache, kept, window), 'DEVICE_MISMATCH', /^queries\[0\] .* await tensor.to\('cpu'\)/)
    expect((await fidelity(host.model, host.cache, kept, host.window)).window).toBeGreaterThan(0)
  })

  it('refuses rows that are not aligned', async () => {
    const base = await Tensor.allocate(device, 'float16', [1000])
    const at = (bytes: bigint, strides: number[]) => Tensor.fromDevicePointer(device, 'float16', base.pointer + bytes, [1, 4, 8], { strides })
    const good = at(0n, [32, 8, 1])
    await refuses(
      () => KvCache.from(device, { keys: [at(2n, [32, 8, 1])], values: [good] }),
      'INVALID_ARGUMENT',
      /^keys\[0\] is at 0x[0-9a-f]+; expected a multiple of 16 bytes/,
    )
    await refuses(
      () => KvCache.from(device, { keys: [good], values: [at(0n, [36, 9, 1])] }),
      'INVALID_ARGUMENT',
      /^values\[0\] .* strides \[36, 9, 1\]; expected multiples of 16 bytes/,
    )
  })

  it('takes streams and events of others, and none by mistake', async () => {
    const { model, cache, window, policy } = await setUp()
    const expected = (await (await selectFrom(model, cache, window, policy)).to('cpu')).tokens
    for (const stream of ['legacy', 'perThread', 1n, 2n] as const) {
      const selection = await selectFrom(model, cache, window, policy, { stream })
      expect((await selection.to('cpu', { stream })).tokens).toEqual(expected)
    }
    await refuses(
      () => selectFrom(model, cache, window, policy, { stream: 0n }),
      'INVALID_ARGUMENT',
      /^options.stream is 0n; .* 'legacy' or 'perThread'/,
    )
    await refuses(() => selectFrom(model, cache, window, policy, { stream: 'default' as never }), 'INVALID_ARGUMENT', /^options.stream is 'default'/)
    await refuses(
      () => selectFrom(model, cache, window, policy, { waitEvent: 7 as never }),
      'INVALID_ARGUMENT',
      /^options.waitEvent is 7; expected an address/,
    )
    const given = Scores.from({ layers: 1, kvHeads: 1, lengths: [9], data: new Float32Array(9) })
    await refuses(() => select(given, policy, { device: cpu, stream: 'legacy' }), 'INVALID_ARGUMENT', /^options has a stream or an event/)
    if (emulated) {
      // Two streams and an event: the second call is ordered after the first.
      const first = evict(model, cache, window, policy, { stream: 0x1000n, recordEvent: 0x77n })
      const second = selectFrom(model, cache, window, policy, { stream: 0x2000n, waitEvent: 0x77n })
      expect((await (await second).to('cpu')).tokens).toEqual(expected)
      await first
    }
  })

  it('can be aborted before it begins and on its way', async () => {
    const { model, cache, window, policy } = await setUp()
    const before = await evict(model, cache, window, policy)
    const reason = new Error('enough')
    const aborted = { code: 'ABORTED', cause: reason }
    await expect(evict(model, cache, window, policy, { signal: AbortSignal.abort(reason) })).rejects.toMatchObject(aborted)
    const outcomes: Promise<unknown>[] = []
    for (let i = 0; i < 30; i++) {
      const controller = new AbortController()
      outcomes.push(evict(model, cache, window, policy, { signal: controller.signal }).catch((error) => error))
      if (i % 3 === 0) await new Promise((resolve) => setTimeout(resolve, i % 2))
      if (i % 3 !== 2) controller.abort(reason)
    }
    for (const [i, outcome] of (await Promise.all(outcomes)).entries()) {
      if (i % 3 === 2) expect(outcome).toMatchObject({ report: { kept: before.report.kept } })
      else if ((outcome as { code?: string }).code !== undefined) expect(outcome).toMatchObject(aborted)
    }
    const after = await evict(model, cache, window, policy)
    expect((await after.selection.to('cpu')).tokens).toEqual((await before.selection.to('cpu')).tokens)
  })

  it('keeps what it uses, whoever lets go of it meanwhile', async () => {
    const expected = await setUp().then(({ model, cache, window, policy }) => evict(model, cache, window, policy))
    const { tokens } = await expected.selection.to('cpu')
    for (let round = 0; round < 5; round++) {
      const { model, cache, window, policy, keys, values } = await setUp()
      const running = evict(model, cache, window, policy)
      for (const tensor of [...keys, ...values, ...window.queries]) tensor.dispose()
      cache.dispose()
      model.dispose()
      // What was let go of may be handed out again at once.
      const next = await Promise.all(
        Array.from({ length: 8 }, () => new Tensor('float32', new Float32Array(6400).fill(Number.NaN), [6400]).to(device)),
      )
      expect((await (await running).selection.to('cpu')).tokens).toEqual(tokens)
      for (const tensor of next) tensor.dispose()
    }
  })

  it('leaves the cache as it was where memory runs out', async () => {
    const { model, cache, window, policy } = await setUp()
    const expected = (await (await selectFrom(model, cache, window, policy)).to('cpu')).tokens
    await refuses(() => Tensor.allocate(device, 'float32', [2 ** 45]), 'OUT_OF_MEMORY', /cudaErrorMemoryAllocation|bytes/)
    // Rows that no memory has room for.
    const many = 2 ** 31 - 1
    const some = Tensor.fromDevicePointer(device, 'float32', cache.keys(0).pointer, [64, many, 256], { strides: [0, 0, 1] })
    const huge = KvCache.from(device, { keys: [some, some], values: [some, some] })
    const all = await Selection.from({ layers: 2, kvHeads: 64, tokens: new Int32Array(0), counts: new Int32Array(128) }).to(device)
    const model2 = AttentionModel.create(device, { layers: 2, queryHeads: 64, kvHeads: 64, headDim: 256 })
    await refuses(() => score(model2, huge, null, policies.knorm({ keep: 0.5 })), 'OUT_OF_MEMORY', /./)
    all.dispose()
    expect(device.lost).toBeUndefined()
    expect((await (await selectFrom(model, cache, window, policy)).to('cpu')).tokens).toEqual(expected)
  })

  it('lets a device go while calls are under way', async () => {
    const on = await Device.open('cuda')
    const { model, cache, window, policy } = await setUp(on)
    const running = [evict(model, cache, window, policy), selectFrom(model, cache, window, policy)] as const
    on.dispose()
    await refuses(() => evict(model, cache, window, policy), 'DISPOSED', /^the device/)
    const [{ cache: kept, selection }, chosen] = await Promise.all(running)
    expect(selection.entries).toBe(chosen.entries)
    await refuses(() => chosen.to('cpu'), 'DISPOSED', /^the device/)
    for (const disposable of [kept, selection, chosen, cache, model]) disposable.dispose()
  })

  // Sanitizers look after every byte that is asked for.
  it.skipIf(process.env.LD_PRELOAD !== undefined)('finds rows beyond 2^31 elements', async () => {
    const random = new Random(5)
    const [heads, size, d, used] = [8, 64, 128, 32]
    const pages = 2 ** 31 / (heads * size * d) + 200
    const bits = (...dims: number[]): Tensor<'bfloat16'> =>
      new Tensor(
        'bfloat16',
        Uint16Array.from({ length: dims.reduce((a, b) => a * b) }, () => 0x3d00 + random.integer(0, 0x2ff) + 0x8000 * random.integer(0, 1)),
        dims,
      )
    const [keys, values] = [bits(used, size, heads, d), bits(used, size, heads, d)]
    const queries = [await bits(heads * 4, 16, d).to(device)]
    const outputProjections = [await bits(64, heads * 4 * d).to(device)]
    const model = AttentionModel.create(device, { layers: 1, queryHeads: heads * 4, kvHeads: heads, headDim: d, outputProjections })
    const policy = policies.laprox({ keep: 0.1, window: 16 })
    const lengths = [used * size - 5]
    const choose = async (list: readonly [Tensor, Tensor], ids: Int32Array) => {
      const pageTable = await new Tensor('int32', ids, [1, used]).to(device)
      const cache = KvCache.from(device, { keys: [list[0]], values: [list[1]], layout: 'NHD', pageTable, lengths })
      const { cache: kept, selection, report } = await evict(model, cache, { queries }, policy)
      const result = [(await selection.to('cpu')).tokens, await kept.keys(0).getData(), await kept.values(0).getData(), report.kept]
      kept.dispose()
      selection.dispose()
      return result
    }
    const small = [await keys.to(device), await values.to(device)] as const
    const expected = await choose(
      small,
      Int32Array.from({ length: used }, (_, i) => i),
    )
    const large = [
      await Tensor.allocate(device, 'bfloat16', [pages, size, heads, d]),
      await Tensor.allocate(device, 'bfloat16', [pages, size, heads, d]),
    ] as const
    const ids = Int32Array.from({ length: used }, (_, i) => (i % 2 === 0 ? pages - 1 - i : i))
    for (const [i, id] of ids.entries()) {
      await large[0].at(id).copyFrom(keys.at(i))
      await large[1].at(id).copyFrom(values.at(i))
    }
    expect(await choose(large, ids)).toEqual(expected)
    for (const tensor of [...small, ...large]) tensor.dispose()
  })

  it('rejects with what went wrong where the GPU is lost, and so does every later one', () => {
    const { stdout, stderr, status } = spawnSync(process.execPath, [fileURLToPath(new URL('lost.mjs', import.meta.url))], {
      encoding: 'utf8',
      timeout: 60_000,
    })
    expect(stderr).toBe('')
    expect(status).toBe(0)
    const { lost, outcomes, later } = JSON.parse(stdout)
    expect(lost).toMatch(/cudaErrorIllegalAddress/)
    for (const [code, message] of outcomes.slice(0, 2)) {
      expect(code).toBe('DEVICE_ERROR')
      expect(message).toMatch(/cudaErrorIllegalAddress/)
    }
    for (const [code, message] of later) {
      expect(code).toBe('DEVICE_ERROR')
      expect(message).toMatch(/^the device is lost: .*cudaErrorIllegalAddress/)
    }
  })
})
