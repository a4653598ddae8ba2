import { fileURLToPath } from 'node:url'
import { InferenceSession, Tensor as OnnxTensor } from 'onnxruntime-node'
import { afterAll, describe, expect, it } from 'vitest'
import { readTasks } from '../lib/evaluation/tasks.js'
import { AttentionModel, compact, Device, evict, KvCache, policies, policy, Selection, Tensor } from '../lib/index.js'
import { cacheFrom, type OnnxTensors, PaddedPast, rectangularFeeds } from '../lib/onnxruntime.js'
import { attended, headDim, kvHeads, layers, openExportedModel, prompt } from './support/exported-model.js'
import { Random } from './support/random.js'

const device = await Device.open('cpu', { threads: 2 })
const exported = await openExportedModel()
const model = AttentionModel.create(device, { layers, queryHeads: kvHeads, kvHeads, headDim })
afterAll(async () => {
  model.dispose()
  device.dispose()
  await exported.release()
})

const random = new Random(11)
const tokens = (count: number): number[] => Array.from({ length: count }, () => Math.floor(random.next() * 16))
const ids = (values: readonly number[]): OnnxTensor => new OnnxTensor('int64', BigInt64Array.from(values, BigInt), [values.length, 1])
const integers = (tensor: OnnxTensor): number[] => Array.from(tensor.data as BigInt64Array, Number)
const queriesOf = (outputs: OnnxTensors): Tensor<'float32'>[] =>
  Array.from({ length: layers }, (_, l) => new Tensor('float32', outputs[`query.${l}`]!.data as Float32Array, outputs[`query.${l}`]!.dims))
const perHead = { window: 2, sinks: 1, pooling: { kind: 'none' } } as const

describe('caches of exported models', () => {
  it('are where their tensors are, by the names of outputs and of inputs', async () => {
    const outputs = await exported.run(prompt([tokens(9)]))
    const cache = cacheFrom(device, outputs)
    expect([cache.kind, cache.layers, cache.sequences, cache.kvHeads, cache.headDim, cache.entries]).toEqual(['contiguous', 2, 1, 2, 8, 36])
    expect(cache.keys(1).data).toBe(outputs['present.1.key']!.data)
    expect(cache.values(0).data).toBe(outputs['present.0.value']!.data)

    const feeds = { 'past_key_values.0.key': outputs['present.0.key']!, 'past_key_values.0.value': outputs['present.0.value']! }
    expect(cacheFrom(device, feeds).keys(0).data).toBe(outputs['present.0.key']!.data)
    const own = { 'k.0': outputs['present.0.key']!, 'v.0': outputs['present.0.value']! }
    expect(cacheFrom(device, own, { names: { key: 'k.%d', value: 'v.%d' } }).layers).toBe(1)
  })

  it('go on from what a policy left: the model sees the kept tokens at their positions, and the new one where it always would be', async () => {
    const read = tokens(40)
    const outputs = await exported.run(prompt([read]))
    const { cache: kept, selection } = await evict(
      model,
      cacheFrom(device, outputs),
      { queries: queriesOf(outputs) },
      policies.snapkv({ keep: 0.3, ...perHead }),
    )
    const feeds = rectangularFeeds(kept)
    expect(feeds['past_key_values.0.key']!.dims).toEqual([1, 2, 12, 8])
    expect(integers(feeds.attention_mask!)).toEqual(Array(13).fill(1))
    expect(integers(feeds.position_ids!)).toEqual([40])

    const next = await exported.run({ input_ids: ids([5]), ...feeds })
    for (let l = 0; l < layers; l++) {
      for (let head = 0; head < kvHeads; head++) {
        const seen = Array.from(selection.kept(l, 0, head), (position) => ({ token: read[position]!, position }))
        const output = (next[`attended.${l}`]!.data as Float32Array).subarray(head * headDim, (head + 1) * headDim)
        for (const [i, value] of attended(l, head, 5, 40, seen).entries()) expect(output[i]).toBeCloseTo(value, 5)
      }
    }
    // Of one sequence, the feeds are the compacted rows themselves.
    expect((feeds['past_key_values.1.key']!.data as Float32Array).buffer).toBe(kept.keys(1).data.buffer)
  })

  it('of padded batches are as those of each sequence alone, padding on either side', async () => {
    const rows = [tokens(30), tokens(21), tokens(26)]
    const keep = policies.snapkv({ keep: 0.4, ...perHead })
    const alone = await Promise.all(
      rows.map(async (row) => {
        const outputs = await exported.run(prompt([row]))
        return evict(model, cacheFrom(device, outputs), { queries: queriesOf(outputs) }, keep)
      }),
    )
    for (const side of ['left', 'right'] as const) {
      const feeds = prompt(
        rows.map((row) => (side === 'left' ? [...Array(30 - row.length).fill(-1), ...row] : [...row, ...Array(30 - row.length).fill(-1)])),
      )
      const outputs = await exported.run(feeds)
      const cache = cacheFrom(device, outputs, { attentionMask: feeds.attention_mask! })
      expect(Array.from(cache.lengths(1))).toEqual([30, 30, 21, 21, 26, 26])
      // A window ends with the last token: right-padded rows are moved to the end, as their reader would.
      const queries = queriesOf(outputs).map((query) =>
        side === 'left'
          ? query
          : atEnd(
              query,
              rows.map((row) => row.length),
            ),
      )
      const { cache: kept, selection } = await evict(model, cache, { queries }, keep)
      const next = rectangularFeeds(kept)
      expect(next['past_key_values.0.value']!.dims).toEqual([3, 2, 12, 8])
      expect(integers(next.attention_mask!)).toEqual([
        ...Array(13).fill(1),
        ...[...Array(4).fill(0), ...Array(9).fill(1)],
        ...[...Array(2).fill(0), ...Array(11).fill(1)],
      ])
      expect(integers(next.position_ids!)).toEqual([30, 21, 26])
      const answers = await exported.run({ input_ids: ids([1, 2, 3]), ...next })
      for (const [s, { selection: own, cache: ownKept }] of alone.entries()) {
        expect(selection.kept(1, s, 1)).toEqual(own.kept(1, 0, 1))
        const answer = await exported.run({ input_ids: ids([s + 1]), ...rectangularFeeds(ownKept) })
        const size = kvHeads * headDim
        const [all, one] = [answers['attended.1']!.data as Float32Array, answer['attended.1']!.data as Float32Array]
        for (let i = 0; i < size; i++) expect(all[s * size + i]).toBeCloseTo(one[i]!, 5)
      }
    }
  })

  it('give position ids and a mask for as many tokens as are read next', async () => {
    const outputs = await exported.run(prompt([tokens(12)]))
    const feeds = rectangularFeeds(cacheFrom(device, outputs), { tokens: 3, names: { key: 'k%d', value: 'v%d' } })
    expect(Object.keys(feeds)).toEqual(['k0', 'v0', 'k1', 'v1', 'attention_mask', 'position_ids'])
    expect([feeds.attention_mask!.dims, feeds.position_ids!.dims]).toEqual([
      [1, 15],
      [1, 3],
    ])
    expect(integers(feeds.position_ids!)).toEqual([12, 13, 14])
    expect(feeds.k0!.data).toEqual(outputs['present.0.key']!.data)
  })

  it('are float16 too', async () => {
    const data = (): Uint16Array => Uint16Array.from({ length: 2 * 10 * 8 }, (_, i) => 0x3000 + i)
    const [key, value] = [new OnnxTensor('float16', data(), [1, 2, 10, 8]), new OnnxTensor('float16', data(), [1, 2, 10, 8])]
    const cache = cacheFrom(device, { 'present.0.key': key, 'present.0.value': value })
    expect(cache.type).toBe('float16')
    const chosen = Selection.from({ layers: 1, kvHeads: 2, tokens: Int32Array.of(0, 3, 9, 1, 2, 8), counts: [3, 3] })
    const feeds = rectangularFeeds(await compact(cache, chosen))
    const past = feeds['past_key_values.0.key']!
    expect([past.type, past.dims]).toEqual(['float16', [1, 2, 3, 8]])
    const bits = new Uint16Array((past.data as Uint16Array).buffer, (past.data as Uint16Array).byteOffset, past.size)
    expect([0, 8, 16, 24].map((i) => bits[i]! - 0x3000)).toEqual([0, 24, 72, 88])
  })

  it('say which layer and heads keep different numbers of rows', async () => {
    const outputs = await exported.run(prompt([tokens(40)]))
    const cache = cacheFrom(device, outputs)
    const feedsOf = async (counts: number[]): Promise<unknown> => {
      const kept = counts.flatMap((count) => Array.from({ length: count }, (_, i) => i))
      return rectangularFeeds(await compact(cache, Selection.from({ layers, kvHeads, tokens: Int32Array.from(kept), counts })))
    }
    await expect(feedsOf([4, 4, 4, 5])).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringMatching(/^the heads of layer 1 keep 4, 5 rows; expected equally many .* scope head .*PaddedPast/),
    })
    await expect(feedsOf([4, 4, 6, 6])).rejects.toThrow('layer 1 keeps 6 rows in each head, and layer 0 4; expected equally many')
  })
})

/** The first `lengths[s]` of each sequence's rows [S, H, m, d], moved to the end. */
function atEnd(queries: Tensor<'float32'>, lengths: readonly number[]): Tensor<'float32'> {
  const [, heads, rows, width] = queries.dims as [number, number, number, number]
  const moved = new Float32Array(queries.size)
  for (const [s, length] of lengths.entries()) {
    for (let head = 0; head < heads; head++) {
      const begin = (s * heads + head) * rows * width
      moved.set(queries.data.subarray(begin, begin + length * width), begin + (rows - length) * width)
    }
  }
  return new Tensor('float32', moved, queries.dims)
}

describe('pasts with a mask per head', async () => {
  const folder = fileURLToPath(new URL('../examples/needle/model/', import.meta.url))
  const session = await InferenceSession.create(`${folder}extend.onnx`, { intraOpNumThreads: 1, interOpNumThreads: 1 })
  afterAll(() => session.release())
  const shape = { layers: 6, kvHeads: 2, headDim: 64 }
  const decoder = AttentionModel.create(device, { ...shape, queryHeads: 8 })
  const read = (await readTasks(`${folder}tasks.safetensors`))[0]!.prompts[0]!.ids.subarray(0, 120)
  const int64 = (values: ArrayLike<number>): OnnxTensor => new OnnxTensor('int64', BigInt64Array.from(values, BigInt), [values.length])
  const extend = (past: PaddedPast, values: ArrayLike<number>): Promise<OnnxTensors> =>
    session.run({ ids: int64(values), position: int64(past.contextLengths), ...past.feeds })
  const logitsOf = ({ logits }: OnnxTensors): Float32Array => logits!.data as Float32Array
  const furthest = (a: Float32Array, b: Float32Array): number => a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i]!)), 0)
  const next = [40, 41, 42]

  const prefill = async (): Promise<{ past: PaddedPast; queries: Tensor<'float32'>[] }> => {
    const past = PaddedPast.empty(shape)
    let outputs = await extend(past, read.subarray(0, 50))
    past.append(outputs)
    outputs = await extend(past, read.subarray(50))
    past.append(outputs)
    const queries = Array.from(
      { length: 6 },
      (_, l) => new Tensor('float32', outputs[`query.${l}`]!.data as Float32Array, outputs[`query.${l}`]!.dims),
    )
    return { past, queries }
  }
  const keep = policy('kv-compress', { keep: 0.3, window: 8 })

  it('that were compacted make the model say what it says of the whole cache with the evicted rows masked', async () => {
    const { past, queries } = await prefill()
    const { cache: kept, selection } = await evict(decoder, past.cache(device), { queries }, keep)
    const shorter = PaddedPast.from(kept)
    expect(shorter.contextLengths).toEqual(Int32Array.of(120))
    const lengths = Array.from({ length: 6 }, (_, l) => kept.lengths(l))
    expect(lengths.some(([a, b]) => a !== b)).toBe(true)
    for (const [l, [a, b]] of lengths.entries()) expect(shorter.feeds[`past_key.${l}`]!.dims).toEqual([2, Math.max(a!, b!), 64])

    const masked = Object.fromEntries(
      Object.entries(past.feeds).map(([name, tensor]) => {
        if (!name.startsWith('past_mask')) return [name, tensor]
        const mask = new Float32Array(2 * 120).fill(-1e30)
        for (const head of [0, 1]) for (const token of selection.kept(Number(name.split('.')[1]), 0, head)) mask[head * 120 + token] = 0
        return [name, new OnnxTensor('float32', mask, [2, 120])]
      }),
    )
    const expected = await session.run({ ids: int64(next), position: int64([120]), ...masked })
    expect(furthest(logitsOf(await extend(shorter, next)), logitsOf(expected))).toBeLessThan(1e-3)
    expect(furthest(logitsOf(await extend(past, next)), logitsOf(expected))).toBeGreaterThan(0.1)
  })

  it('take tokens in, with room for them or without, as if they had been read at once', async () => {
    const { past, queries } = await prefill()
    const { cache: kept } = await evict(decoder, past.cache(device), { queries }, keep)
    const atOnce = logitsOf(await extend(PaddedPast.from(kept), next)).subarray(-2048)
    for (const room of [0, 1, 8]) {
      const growing = PaddedPast.from(kept, { room })
      const before = growing.feeds
      let outputs: OnnxTensors = {}
      for (const token of next) {
        outputs = await extend(growing, [token])
        growing.append(outputs)
      }
      expect(growing.feeds === before).toBe(room === 8)
      expect(growing.contextLengths).toEqual(Int32Array.of(123))
      expect(furthest(logitsOf(outputs), atOnce)).toBeLessThan(1e-3)
    }
  })

  it('can be evicted from again: appended tokens have the positions that follow the prompt', async () => {
    const { past, queries } = await prefill()
    const { cache: kept } = await evict(decoder, past.cache(device), { queries }, keep)
    const going = PaddedPast.from(kept, { room: 2 })
    going.append(await extend(going, next))
    const again = going.cache(device)
    expect(again.contextLengths()).toEqual(Int32Array.of(123))
    expect(Array.from(again.lengths(0))).toEqual(Array.from(kept.lengths(0), (length) => length + 3))
    const positions = again.positions(0)
    for (const head of [0, 1]) {
      const length = kept.lengths(0)[head]!
      const own = positions.at(head).subarray(0, length + 3)
      const found = Array.from({ length: length + 3 }, (_, i) => own.data[own.offset + i])
      const rows = kept.positions(0).subarray(kept.rowStarts(0)[head]!, kept.rowStarts(0)[head]! + length)
      expect(found).toEqual([...Array.from({ length }, (_, i) => rows.data[rows.offset + i]), 120, 121, 122])
    }
    const { selection } = await evict(decoder, again, null, policy('knorm', { keep: 0.5, scope: 'model', sinks: 0, recent: 2 }))
    for (const head of [0, 1]) expect(Array.from(selection.kept(0, 0, head)).slice(-2)).toEqual([1, 2].map((i) => again.lengths(0)[head]! - 3 + i))
  })

  it('have a first dimension for batches, and other names where a graph has them', () => {
    const data = (): Tensor<'float32'> =>
      new Tensor(
        'float32',
        Float32Array.from({ length: 2 * 2 * 3 * 8 }, (_, i) => i),
        [2, 2, 3, 8],
      )
    const cache = KvCache.from(device, { keys: [data()], values: [data()], lengths: [[3, 1, 2, 2]] })
    const past = PaddedPast.from(cache, { room: 1, names: { pastKey: 'k%d', pastMask: 'm%d' } })
    expect(Object.keys(past.feeds)).toEqual(['k0', 'past_value.0', 'm0'])
    expect([past.feeds.k0!.dims, past.feeds.m0!.dims]).toEqual([
      [2, 2, 4, 8],
      [2, 2, 4],
    ])
    const dark = Math.fround(-1e30)
    expect(Array.from(past.feeds.m0!.data as Float32Array)).toEqual([0, 0, 0, dark, 0, dark, dark, dark, 0, 0, dark, dark, 0, 0, dark, dark])
    expect(past.contextLengths).toEqual(Int32Array.of(3, 2))
    const fresh = new OnnxTensor(
      'float32',
      Float32Array.from({ length: 32 }, (_, i) => 1000 + i),
      [2, 2, 1, 8],
    )
    past.append({ 'key.0': fresh, 'value.0': fresh })
    const keys = past.feeds.k0!.data as Float32Array
    expect([3, 5, 10, 14].map((row) => keys[row * 8])).toEqual([1000, 1008, 1016, 1024])
    expect(past.contextLengths).toEqual(Int32Array.of(4, 3))
    expect(() => PaddedPast.from(cache, { batched: false })).toThrow('batched is false; expected true for 2 sequences')

    const one = KvCache.from(device, { keys: [data().at(0)], values: [data().at(0)] })
    expect(PaddedPast.from(one, { batched: true }).feeds['past_key.0']!.dims).toEqual([1, 2, 3, 8])
    expect(PaddedPast.from(one).feeds['past_key.0']!.dims).toEqual([2, 3, 8])
  })

  it('are float16 too, masked by its least finite number', () => {
    const past = PaddedPast.empty({ layers: 1, kvHeads: 1, headDim: 8, type: 'float16' }, { room: 1 })
    const row = new OnnxTensor(
      'float16',
      Uint16Array.from({ length: 8 }, (_, i) => i),
      [1, 1, 8],
    )
    const bits = (name: string): number[] => {
      const { data, size } = past.feeds[name]!
      return Array.from(new Uint16Array((data as Uint16Array).buffer, (data as Uint16Array).byteOffset, size))
    }
    expect(bits('past_mask.0')).toEqual([0xfbff])
    past.append({ 'key.0': row, 'value.0': row })
    expect([bits('past_key.0'), bits('past_mask.0')]).toEqual([[0, 1, 2, 3, 4, 5, 6, 7], [0]])
  })
})

describe('mistakes are named', () => {
  const tensor = (dims: readonly number[], type: 'float32' | 'int64' = 'float32'): OnnxTensor => {
    const size = dims.reduce((product, dim) => product * dim, 1)
    return type === 'float32' ? new OnnxTensor(type, new Float32Array(size), dims) : new OnnxTensor(type, new BigInt64Array(size), dims)
  }
  const cacheOf =
    (outputs: OnnxTensors, options = {}) =>
    () =>
      cacheFrom(device, outputs, options)
  const layer = (dims: readonly number[]): OnnxTensors => ({ 'present.0.key': tensor(dims), 'present.0.value': tensor(dims) })

  it('in what a session gave', () => {
    expect(cacheOf({ 'presents.0.key': tensor([1, 1, 2, 8]) })).toThrow("there is no tensor 'present.0.key'; did you mean 'presents.0.key'?")
    expect(cacheOf({ logits: tensor([1, 2]) })).toThrow("there is no tensor 'present.0.key'; there are 'logits'")
    expect(cacheOf({ 'present.0.key': tensor([1, 1, 2, 8]) })).toThrow("there is no tensor 'present.0.value'; there are 'present.0.key'.")
    expect(cacheOf({ ...layer([1, 1, 2, 8]), 'present.1.key': tensor([1, 1, 2, 8]) })).toThrow('values has 1 tensors; expected one per layer, 2')
    expect(cacheOf({ 'present.0.key': tensor([1, 1, 2, 8], 'int64') })).toThrow('present.0.key is int64 [1, 1, 2, 8]; expected float32 or float16')
    expect(cacheOf(layer([1, 1, 2, 8]), { names: { key: 'present.0.key', value: 'present.%d.value' } })).toThrow("names: 'present.0.key' has no %d")
    const elsewhere = OnnxTensor.fromGpuBuffer({} as never, { dataType: 'float32', dims: [1, 1, 2, 8] })
    expect(cacheOf({ 'present.0.key': elsewhere })).toThrow(expect.objectContaining({ code: 'DEVICE_MISMATCH' }))
    const masked = (mask: OnnxTensor) => cacheOf(layer([2, 1, 3, 8]), { attentionMask: mask })
    expect(masked(tensor([2, 4], 'int64'))).toThrow('attentionMask is int64 [2, 4]; expected int64 or int32 [S, n] = [2, 3]')
    expect(masked(new OnnxTensor('int64', [1n, 1n, 1n, 1n, 0n, 1n], [2, 3]))).toThrow('attentionMask: row 1 is no run of ones')
    expect(masked(new OnnxTensor('int32', [1, 1, 1, 0, 0, 1], [2, 3]))().lengths(0)).toEqual(Int32Array.of(3, 1))
  })

  it('in what is to become feeds', () => {
    const rows = (type: 'float32' | 'bfloat16'): Tensor => Tensor.zeros(type, [4, 2, 8])
    const pageTable = new Tensor('int32', Int32Array.of(0, 1), [1, 2])
    const paged = KvCache.from(device, {
      keys: [rows('float32')],
      values: [rows('float32')],
      layout: 'NHD',
      pageTable: pageTable.subarray(0, 1),
      lengths: [3],
      ...{},
    })
    expect(() => rectangularFeeds(paged)).toThrow('cache is paged')
    expect(() => PaddedPast.from(paged)).toThrow('cache is paged')
    const brain = KvCache.from(device, { keys: [rows('bfloat16')], values: [rows('bfloat16')] })
    expect(() => rectangularFeeds(brain)).toThrow('cache is bfloat16; expected float32 or float16')
    const plain = KvCache.from(device, { keys: [rows('float32')], values: [rows('float32')] })
    expect(() => rectangularFeeds(plain, { tokens: 0 })).toThrow('tokens is 0; expected an integer of at least 1')
    expect(() => PaddedPast.from(plain, { room: -1 })).toThrow('room is -1')
  })

  it('in what a run gave, before anything is added', () => {
    const past = PaddedPast.empty({ layers: 2, kvHeads: 1, headDim: 8 })
    const good = { 'key.0': tensor([1, 2, 8]), 'value.0': tensor([1, 2, 8]), 'key.1': tensor([1, 2, 8]), 'value.1': tensor([1, 2, 8]) }
    expect(() => past.append({ ...good, 'value.1': undefined } as unknown as OnnxTensors)).toThrow("there is no tensor 'value.1'")
    expect(() => past.append({ ...good, 'value.1': tensor([2, 1, 8]) })).toThrow(
      'value.1 is float32 [2, 1, 8]; expected float32 [G, tokens, d] = [1, 1, 8]',
    )
    expect(() => past.append({ ...good, 'value.1': tensor([1, 3, 8]) })).toThrow('layer 1 has other numbers of tokens')
    expect([past.contextLengths[0], past.feeds['past_key.0']!.dims]).toEqual([0, [1, 0, 8]])
    past.append(good)
    expect([past.contextLengths[0], past.feeds['past_key.1']!.dims]).toEqual([2, [1, 2, 8]])
  })
})
