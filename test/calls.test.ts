import { afterAll, describe, expect, it } from 'vitest'
import {
  AttentionModel,
  type CacheDescription,
  compact,
  Device,
  evict,
  KvCache,
  type LaproxErrorCode,
  type ModelDescription,
  policies,
  Scores,
  type ScoresDescription,
  Selection,
  score,
  select,
  selectFrom,
  Tensor,
  type Window,
} from '../lib/index.js'
import { Random } from './support/random.js'

const device = await Device.open('cpu', { threads: 1 })
const other = await Device.open('cpu', { threads: 1 })
afterAll(() => {
  device.dispose()
  other.dispose()
})

const floats = (...dims: number[]): Tensor<'float32'> => Tensor.zeros('float32', dims)
const halves = (...dims: number[]): Tensor<'float16'> => Tensor.zeros('float16', dims)
const ints = (...dims: number[]): Tensor<'int32'> => Tensor.zeros('int32', dims)

/** Checks that a call fails with a code and a sentence; whatever it threw beforehand counts as a rejection. */
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

type Case = readonly [what: string, code: LaproxErrorCode, message: RegExp, given: object]

describe('Device.open', () => {
  it.each<readonly [string, LaproxErrorCode, RegExp, unknown, unknown?]>([
    ['an unknown name', 'INVALID_ARGUMENT', /^name is 'quantum'; expected one of auto, cpu, cuda/, 'quantum'],
    ['a misspelt name', 'INVALID_ARGUMENT', /did you mean 'cuda'/, 'cude'],
    ['a name of another type', 'INVALID_ARGUMENT', /^name is 3;/, 3],
    ['a device that is not there', 'NO_DEVICE', /./, 'cuda:4711'],
    ['no threads', 'INVALID_ARGUMENT', /^options.threads is 0; expected an integer from 1/, 'cpu', { threads: 0 }],
    ['a fraction of threads', 'INVALID_ARGUMENT', /^options.threads is 1.5/, 'cpu', { threads: 1.5 }],
    ['too many threads', 'INVALID_ARGUMENT', /^options.threads is 100000/, 'cpu', { threads: 1e5 }],
    ['an unknown instruction set', 'INVALID_ARGUMENT', /^options.instructionSet is 'avx1'; did you mean 'avx2'/, 'cpu', { instructionSet: 'avx1' }],
    ['options that are none', 'INVALID_ARGUMENT', /^options is 4; expected an object/, 'cpu', 4],
    ['null for options', 'INVALID_ARGUMENT', /^options is null; expected an object/, 'cpu', null],
  ])('refuses %s', (_, code, message, name, options) =>
    refuses(() => Device.open(name as never, options as never), code as LaproxErrorCode, message as RegExp),
  )

  it('tells what there is', async () => {
    const info = device.info()
    expect(info).toMatchObject({ backend: 'cpu', index: 0, name: 'CPU', threads: 1 })
    expect(info.backends.map(({ backend }) => backend)).toEqual(['cpu', 'cuda'])
    for (const { available, code, reason } of info.backends) {
      expect(available ? [code, reason] : [typeof code, typeof reason]).toEqual(available ? [undefined, undefined] : ['string', 'string'])
    }
    expect(Object.isFrozen(info)).toBe(true)
    using auto = await Device.open()
    expect(auto.info().backend).toBe(info.backends[1]!.available ? 'cuda' : 'cpu')
    using baseline = await Device.open('cpu', { instructionSet: 'baseline' })
    expect(baseline.info().instructionSet).toBe('baseline')
  })
})

const SHAPE = { layers: 2, queryHeads: 4, kvHeads: 2, headDim: 8 }

describe('AttentionModel.create', () => {
  const weights = (): Tensor[] => [floats(16, 32), floats(16, 32)]

  it.each<Case>([
    ['no layers', 'INVALID_ARGUMENT', /^layers is 0; expected an integer of at least 1/, { layers: 0 }],
    ['a fraction of heads', 'INVALID_ARGUMENT', /^kvHeads is 1.5/, { kvHeads: 1.5 }],
    ['a missing shape', 'INVALID_ARGUMENT', /^headDim is missing/, { headDim: undefined }],
    ['a head dimension that is no multiple of 8', 'INVALID_ARGUMENT', /^headDim is 12; expected a multiple of 8/, { headDim: 12 }],
    ['a head dimension above 256', 'INVALID_ARGUMENT', /^headDim is 264; expected an integer from 8 to 256/, { headDim: 264 }],
    ['heads that form no groups', 'INVALID_ARGUMENT', /^queryHeads is 5; expected a multiple of kvHeads, 2/, { queryHeads: 5 }],
    ['groups beyond what is built', 'INVALID_ARGUMENT', /./, { queryHeads: 2000 }],
    [
      'projections that are no array',
      'INVALID_ARGUMENT',
      /^outputProjections is float32 \[16, 32\]; expected an array/,
      { outputProjections: floats(16, 32) },
    ],
    [
      'too few projections',
      'INVALID_ARGUMENT',
      /^outputProjections has 1 tensors; expected one per layer, 2/,
      { outputProjections: [floats(16, 32)] },
    ],
    [
      'a projection that is no tensor',
      'INVALID_ARGUMENT',
      /^outputProjections\[1\] is Float32Array\(4\); expected a Tensor/,
      { outputProjections: [floats(16, 32), new Float32Array(4)] },
    ],
    [
      'a transposed projection',
      'INVALID_ARGUMENT',
      /^outputProjections\[0\] is float32 \[32, 16\]; expected \[D, queryHeads \* headDim\] = \[32, 32\]/,
      { outputProjections: [floats(32, 16), floats(32, 16)] },
    ],
    ['projections of different widths', 'INVALID_ARGUMENT', /^outputProjections\[1\]/, { outputProjections: [floats(16, 32), floats(24, 32)] }],
    [
      'projections of different types',
      'INVALID_ARGUMENT',
      /^outputProjections\[1\] is float16 .*; expected type float32/,
      { outputProjections: [floats(16, 32), halves(16, 32)] },
    ],
    [
      'projections of integers',
      'INVALID_ARGUMENT',
      /^outputProjections\[0\] is int32 .*; expected type float32, float16 or bfloat16/,
      { outputProjections: [ints(16, 32), ints(16, 32)] },
    ],
    ['projections of no width', 'INVALID_ARGUMENT', /D of at least 1/, { outputProjections: [floats(0, 32), floats(0, 32)] }],
    ['a negative scale', 'INVALID_ARGUMENT', /^scale is -1; expected a finite number of at least 0/, { scale: -1 }],
    ['an infinite soft-cap', 'INVALID_ARGUMENT', /^softCap\[1\] is Infinity/, { softCap: [0, Number.POSITIVE_INFINITY] }],
    ['scales of too many layers', 'INVALID_ARGUMENT', /^scale has 3 values; expected one, or one per layer, 2/, { scale: [1, 1, 1] }],
    ['half a sliding window', 'INVALID_ARGUMENT', /^slidingWindow is 0.5/, { slidingWindow: 0.5 }],
    [
      'too few sink logits',
      'INVALID_ARGUMENT',
      /^sinkLogits is Float32Array\(3\); expected a Float32Array with one logit per query head, 4/,
      { sinkLogits: new Float32Array(3) },
    ],
    ['sink logits of another kind', 'INVALID_ARGUMENT', /^sinkLogits\[0\] is 'none'/, { sinkLogits: ['none', null] }],
  ])('refuses %s', (_, code, message, given) =>
    refuses(() => AttentionModel.create(device, { ...SHAPE, ...given } as ModelDescription).ready, code, message),
  )

  it('refuses what is no device and no description', async () => {
    await refuses(() => AttentionModel.create({} as Device, SHAPE), 'INVALID_ARGUMENT', /^device is \{\}; expected a Device/)
    await refuses(() => AttentionModel.create(device, undefined as never), 'INVALID_ARGUMENT', /^description is missing/)
    const disposed = await Device.open('cpu', { threads: 1 })
    disposed.dispose()
    await refuses(() => AttentionModel.create(disposed, SHAPE), 'DISPOSED', /^the device/)
  })

  it('refuses projections whose memory is gone', async () => {
    const [first, second] = weights() as [Tensor, Tensor]
    second.dispose()
    await refuses(() => AttentionModel.create(device, { ...SHAPE, outputProjections: [first, second] }), 'DISPOSED', /^the tensor float32 \[16, 32\]/)
  })

  it('fails later for weights that are not finite, and so do its calls', async () => {
    const outputProjections = weights()
    ;(outputProjections[1]!.data as Float32Array)[7] = Number.NaN
    const model = AttentionModel.create(device, { ...SHAPE, outputProjections })
    const { cache, window } = ready()
    await refuses(() => score(model, cache, window, policy), 'NON_FINITE', /model could not be created/)
    await refuses(() => model.ready, 'NON_FINITE', /layer 1|projection/)
    model.dispose()
  })

  it('reports failures that nobody looks at nowhere', async () => {
    const outputProjections = weights()
    ;(outputProjections[0]!.data as Float32Array).fill(Number.POSITIVE_INFINITY)
    AttentionModel.create(device, { ...SHAPE, outputProjections }).dispose()
    await new Promise((resolve) => setTimeout(resolve, 20))
  })
})

const policy = policies.laprox({ keep: 0.5, window: 4 })

/** A contiguous cache of 20 tokens with a model and a window that fit it. */
function ready() {
  const planes = (): Tensor[] => [floats(2, 20, 8), floats(2, 20, 8)]
  const description = { keys: planes(), values: planes() }
  const outputProjections = [floats(16, 32), floats(16, 32)]
  for (const { data } of outputProjections) data.fill(1)
  const model = AttentionModel.create(device, { ...SHAPE, outputProjections })
  const window: Window = { queries: [floats(4, 4, 8), floats(4, 4, 8)] }
  return { model, cache: KvCache.from(device, description), window, description }
}

const two = <T>(make: () => T): [T, T] => [make(), make()]

describe('KvCache.from', () => {
  const contiguous = { keys: two(() => floats(2, 20, 8)), values: two(() => floats(2, 20, 8)) }
  const paged = {
    keys: two(() => floats(6, 4, 2, 8)),
    values: two(() => floats(6, 4, 2, 8)),
    layout: 'NHD',
    pageTable: ints(1, 5),
    lengths: [20],
  }
  const ragged = { keys: two(() => floats(30, 8)), values: two(() => floats(30, 8)), lengths: [10, 20] }

  it.each<Case>([
    ['no keys', 'INVALID_ARGUMENT', /^keys is missing; expected an array with one tensor per layer/, { ...contiguous, keys: undefined }],
    ['no layers', 'INVALID_ARGUMENT', /^keys is \[\]/, { keys: [], values: [] }],
    ['values of other layers', 'INVALID_ARGUMENT', /^values has 1 tensors; expected one per layer, 2/, { ...contiguous, values: [floats(2, 20, 8)] }],
    [
      'values of another type',
      'INVALID_ARGUMENT',
      /^values\[0\] is float16 \[2, 20, 8\]; expected type float32/,
      { ...contiguous, values: two(() => halves(2, 20, 8)) },
    ],
    ['keys of integers', 'INVALID_ARGUMENT', /^keys\[0\] is int32/, { ...contiguous, keys: two(() => ints(2, 20, 8)) }],
    [
      'values of another shape',
      'INVALID_ARGUMENT',
      /^values\[1\] is float32 \[2, 21, 8\]; expected the dims of keys = \[2, 20, 8\]/,
      { ...contiguous, values: [floats(2, 20, 8), floats(2, 21, 8)] },
    ],
    [
      'layers of different heads',
      'INVALID_ARGUMENT',
      /^keys\[1\] is float32 \[3, 20, 8\]; expected dims as those of keys\[0\] = \[2, any, 8\]/,
      { keys: [floats(2, 20, 8), floats(3, 20, 8)], values: [floats(2, 20, 8), floats(3, 20, 8)] },
    ],
    [
      'layers of different ranks',
      'INVALID_ARGUMENT',
      /^keys\[1\]/,
      { keys: [floats(2, 20, 8), floats(1, 2, 20, 8)], values: [floats(2, 20, 8), floats(1, 2, 20, 8)] },
    ],
    [
      'a head dimension that is no multiple of 8',
      'INVALID_ARGUMENT',
      /^keys\[0\] is float32 \[2, 20, 6\]; expected a head dimension d/,
      { keys: two(() => floats(2, 20, 6)), values: two(() => floats(2, 20, 6)) },
    ],
    ['no heads', 'INVALID_ARGUMENT', /at least one sequence and one KV head/, { keys: [floats(0, 20, 8)], values: [floats(0, 20, 8)] }],
    [
      'a rank that means nothing',
      'INVALID_ARGUMENT',
      /^keys\[0\] is float32 \[8\]; expected \[G, n, d\], \[S, G, n, d\] or \(ragged\) \[rows, d\]/,
      { keys: [floats(8)], values: [floats(8)] },
    ],
    [
      'rows with gaps',
      'INVALID_ARGUMENT',
      /^keys\[0\] .* strides \[320, 16, 2\]; expected stride 1/,
      { keys: [new Tensor('float32', new Float32Array(640), [2, 20, 8], { strides: [320, 16, 2] })], values: [floats(2, 20, 8)] },
    ],
    ['positions without contextLengths', 'INVALID_ARGUMENT', /^contextLengths is missing/, { ...contiguous, positions: two(() => ints(2, 20)) }],
    [
      'positions of another shape',
      'INVALID_ARGUMENT',
      /^positions\[0\] is int32 \[20\]; expected the dims of keys without the last = \[2, 20\]/,
      { ...contiguous, positions: two(() => ints(20)), contextLengths: [20] },
    ],
    [
      'positions of another type',
      'INVALID_ARGUMENT',
      /^positions\[0\] is float32 .*; expected type int32/,
      { ...contiguous, positions: two(() => floats(2, 20)), contextLengths: [20] },
    ],
    ['norms of another type', 'INVALID_ARGUMENT', /^valueNorms\[0\] is int32/, { ...contiguous, valueNorms: two(() => ints(2, 20)) }],
    [
      'contexts of other sequences',
      'INVALID_ARGUMENT',
      /^contextLengths has 2 numbers; expected one per sequence, 1/,
      { ...contiguous, contextLengths: [20, 20] },
    ],
    [
      'contexts below the lengths',
      'INVALID_ARGUMENT',
      /^contextLengths: 19 is below 20/,
      { ...contiguous, positions: two(() => ints(2, 20)), contextLengths: [19] },
    ],
    ['lengths beyond the capacity', 'OUT_OF_BOUNDS', /^lengths\[0\] is 21; layer 0 has room for 20 tokens/, { ...contiguous, lengths: [21] }],
    ['negative lengths', 'INVALID_ARGUMENT', /^lengths\[0\] is -1; expected an integer of at least 0/, { ...contiguous, lengths: [-1] }],
    [
      'lengths of too many layers',
      'INVALID_ARGUMENT',
      /^lengths has 3 items; expected one per layer, 2/,
      { ...contiguous, lengths: [[20], [20], [20]] },
    ],
    [
      'lengths of other sequences',
      'INVALID_ARGUMENT',
      /^lengths has 3 numbers; expected one per sequence, 1, or per head, 2/,
      { ...contiguous, lengths: [20, 20, 20] },
    ],
    ['lengths that are text', 'INVALID_ARGUMENT', /^lengths is 'many'/, { ...contiguous, lengths: 'many' }],
    ['lengths of floats', 'INVALID_ARGUMENT', /^lengths is float32 \[1\]; expected an Int32Array/, { ...contiguous, lengths: floats(1) }],
    ['pages without a layout', 'INVALID_ARGUMENT', /^layout is missing; expected 'NHD' or 'HND'/, { ...paged, layout: undefined }],
    ['pages of another layout', 'INVALID_ARGUMENT', /^layout is 'NCHW'/, { ...paged, layout: 'NCHW' }],
    ['pages without lengths', 'INVALID_ARGUMENT', /^lengths is missing/, { ...paged, lengths: undefined }],
    [
      'pages of the wrong rank',
      'INVALID_ARGUMENT',
      /^keys\[0\] is float32 \[6, 8\]; expected \[pages, pageSize, G, d\]/,
      { ...paged, keys: [floats(6, 8)], values: [floats(6, 8)] },
    ],
    ['pages of no tokens', 'INVALID_ARGUMENT', /pages of at least one token/, { ...paged, keys: [floats(6, 0, 2, 8)], values: [floats(6, 0, 2, 8)] }],
    [
      'a table of floats',
      'INVALID_ARGUMENT',
      /^pageTable is float32 \[1, 5\]; expected int32 \[S, P\] or \[S, G, P\]/,
      { ...paged, pageTable: floats(1, 5) },
    ],
    [
      'a table that is no tensor',
      'INVALID_ARGUMENT',
      /^pageTable is Int32Array\(5\); expected an int32 Tensor/,
      { ...paged, pageTable: new Int32Array(5) },
    ],
    ['a table without room', 'INVALID_ARGUMENT', /room for at least one page/, { ...paged, pageTable: ints(1, 0) }],
    [
      'tables of other heads',
      'INVALID_ARGUMENT',
      /^pageTable\[0\] is int32 \[1, 3, 5\]; expected \[S, P\] or \[S, G, P\] = \[1, 2, any\]/,
      { ...paged, pageTable: ints(1, 3, 5) },
    ],
    ['tables of too few layers', 'INVALID_ARGUMENT', /^pageTable has 1 tensors/, { ...paged, pageTable: [ints(1, 5)] }],
    ['lengths beyond the table', 'OUT_OF_BOUNDS', /^lengths\[0\] is 21; layer 0 has room for 20 tokens/, { ...paged, lengths: [21] }],
    ['rows without lengths', 'INVALID_ARGUMENT', /^lengths is missing; expected the tokens of each head/, { ...ragged, lengths: undefined }],
    ['rows of fewer tokens', 'OUT_OF_BOUNDS', /^lengths of layer 0 sum up to 31; keys\[0\] has 30 rows/, { ...ragged, lengths: [11, 20] }],
    [
      'rows of sequences that do not divide the heads',
      'INVALID_ARGUMENT',
      /^lengths has 3 numbers; expected a multiple of the 2 sequences/,
      { ...ragged, lengths: [1, 2, 3], contextLengths: [9, 9] },
    ],
    [
      'rows with lengths per sequence',
      'INVALID_ARGUMENT',
      /^lengths\[1\] has 1 numbers; expected one per head, 2/,
      { ...ragged, lengths: [[10, 20], [30]] },
    ],
  ])('refuses %s', (_, code, message, given) => refuses(() => KvCache.from(device, given as CacheDescription), code, message))

  it('refuses tensors whose memory is gone', async () => {
    const keys = two(() => floats(2, 20, 8))
    keys[1].dispose()
    await refuses(() => KvCache.from(device, { ...contiguous, keys }), 'DISPOSED', /^the tensor/)
    await refuses(() => KvCache.from(device, null as never), 'INVALID_ARGUMENT', /^description is null/)
  })

  it('tells its shape', async () => {
    const cache = KvCache.from(device, { ...ragged, lengths: [10, 20] } as CacheDescription)
    expect(cache).toMatchObject({
      kind: 'ragged',
      type: 'float32',
      layers: 2,
      sequences: 1,
      kvHeads: 2,
      headDim: 8,
      entries: 60,
      bytes: 60 * 64,
      hasPositions: false,
    })
    expect([...cache.cumulativeLengths(1)]).toEqual([0, 10, 30])
    expect([...cache.rowStarts(1)]).toEqual([0, 10])
    expect(cache.keys(1).dims).toEqual([30, 8])
    expect(cache.contextLengths()).toBeUndefined()
    await refuses(() => cache.positions(0), 'INVALID_ARGUMENT', /^positions: the cache has none/)
    await refuses(() => cache.pageTable(0), 'INVALID_ARGUMENT', /^pageTable: the cache is ragged/)
    await refuses(() => cache.keys(2), 'OUT_OF_BOUNDS', /^layer is 2; expected 0 to 1/)
    await refuses(() => cache.lengths(-1), 'OUT_OF_BOUNDS', /^layer is -1/)
    const pages = KvCache.from(device, paged as CacheDescription)
    expect(pages.kind).toBe('paged')
    expect(pages.pageTable(0).dims).toEqual([1, 5])
    await refuses(() => pages.rowStarts(0), 'INVALID_ARGUMENT', /^rowStarts: the cache is paged/)
  })

  it('copies lengths and takes tensors as they are', () => {
    const lengths = Int32Array.of(7)
    const cache = KvCache.from(device, { ...contiguous, lengths })
    lengths[0] = 3
    cache.lengths(0)[0] = 5
    expect([...cache.lengths(0)]).toEqual([7, 7])
    expect(cache.keys(0)).toBe(contiguous.keys[0])
  })
})

describe('score, selectFrom and evict', () => {
  const { model, cache, window } = ready()
  const each = async (
    code: LaproxErrorCode,
    message: RegExp,
    given: { model?: unknown; cache?: unknown; window?: unknown; policy?: unknown; options?: unknown },
  ): Promise<void> => {
    const all = { model, cache, window, policy, ...given }
    for (const call of [score, selectFrom, evict]) {
      await refuses(
        () => call(all.model as AttentionModel, all.cache as KvCache, all.window as Window, all.policy as typeof policy, all.options as object),
        code,
        message,
      )
    }
  }

  it.each<Case>([
    ['a model that is none', 'INVALID_ARGUMENT', /^model is \{\}; expected an AttentionModel/, { model: {} }],
    ['a cache that is none', 'INVALID_ARGUMENT', /^cache is missing; expected a KvCache/, { cache: undefined }],
    ['a policy that is none', 'INVALID_ARGUMENT', /policy/, { policy: 'laprox' }],
    ['a policy with a window of 0', 'INVALID_ARGUMENT', /window is 0/, { policy: { ...policy, window: 0 } }],
    ['a policy with a window of 129', 'INVALID_ARGUMENT', /window is 129/, { policy: { ...policy, window: 129 } }],
    [
      'weights of too many layers',
      'INVALID_ARGUMENT',
      /^policy: layerWeights has 3 numbers; expected one per layer, 2/,
      { policy: { ...policy, layerWeights: [1, 1, 1] } },
    ],
    ['no window', 'INVALID_ARGUMENT', /^window is null; expected an object with queries/, { window: null }],
    ['a window without queries', 'INVALID_ARGUMENT', /^queries is missing/, { window: {} }],
    ['queries of other layers', 'INVALID_ARGUMENT', /^queries has 1 tensors; expected one per layer, 2/, { window: { queries: [floats(4, 4, 8)] } }],
    [
      'queries of other heads',
      'INVALID_ARGUMENT',
      /^queries\[0\] is float32 \[2, 4, 8\]; expected \[H, m, d\] = \[4, 4, 8\]/,
      { window: { queries: two(() => floats(2, 4, 8)) } },
    ],
    [
      'queries of another dimension',
      'INVALID_ARGUMENT',
      /^queries\[0\] is float32 \[4, 4, 16\]/,
      { window: { queries: two(() => floats(4, 4, 16)) } },
    ],
    [
      'queries of other sequences',
      'INVALID_ARGUMENT',
      /^queries\[0\] is float32 \[2, 4, 4, 8\]; expected \[S, H, m, d\] = \[1, 4, 4, 8\]/,
      { window: { queries: two(() => floats(2, 4, 4, 8)) } },
    ],
    [
      'queries of a rank that means nothing',
      'INVALID_ARGUMENT',
      /^queries\[0\] is float32 \[4, 8\]/,
      { window: { queries: two(() => floats(4, 8)) } },
    ],
    ['queries of integers', 'INVALID_ARGUMENT', /^queries\[0\] is int32/, { window: { queries: two(() => ints(4, 4, 8)) } }],
    ['queries of different types', 'INVALID_ARGUMENT', /^queries\[1\] is float16/, { window: { queries: [floats(4, 4, 8), halves(4, 4, 8)] } }],
    [
      'fewer queries than the policy looks at',
      'INVALID_ARGUMENT',
      /^queries have 3 rows; expected the last 4 queries/,
      { window: { queries: two(() => floats(4, 3, 8)) } },
    ],
    ['no queries', 'INVALID_ARGUMENT', /^queries have 0 rows/, { window: { queries: two(() => floats(4, 0, 8)) } }],
    [
      'a log-sum-exp of another shape',
      'INVALID_ARGUMENT',
      /^logSumExp\[0\] is float32 \[4\]; expected \[H, m\] = \[4, 4\]/,
      { window: { ...window, logSumExp: two(() => floats(4)) } },
    ],
    [
      'a log-sum-exp of another type',
      'INVALID_ARGUMENT',
      /^logSumExp\[0\] is float16 .*; expected type float32/,
      { window: { ...window, logSumExp: two(() => halves(4, 4)) } },
    ],
    ['a log-sum-exp of other layers', 'INVALID_ARGUMENT', /^logSumExp has 1 tensors/, { window: { ...window, logSumExp: [floats(4, 4)] } }],
    ['a log-sum-exp to another base', 'INVALID_ARGUMENT', /^logSumExpBase is 10; expected 'e' or '2'/, { window: { ...window, logSumExpBase: 10 } }],
    ['a signal that is none', 'INVALID_ARGUMENT', /^options.signal is/, { options: { signal: 'stop' } }],
    ['progress that is no function', 'INVALID_ARGUMENT', /^options.progress is/, { options: { progress: 1 } }],
  ])('refuse %s', (_, code, message, given) => each(code, message, given))

  it('refuse a cache of another shape or device than the model', async () => {
    const shape = (layers: number, ...dims: number[]): KvCache => {
      const planes = (): Tensor[] => Array.from({ length: layers }, () => floats(...dims))
      return KvCache.from(device, { keys: planes(), values: planes() })
    }
    await each('INVALID_ARGUMENT', /^cache: layers is 1; expected that of the model, 2/, { cache: shape(1, 2, 20, 8) })
    await each('INVALID_ARGUMENT', /^cache: kvHeads is 4; expected that of the model, 2/, { cache: shape(2, 4, 20, 8) })
    await each('INVALID_ARGUMENT', /^cache: headDim is 16; expected that of the model, 8/, { cache: shape(2, 2, 20, 16) })
    const planes = { keys: two(() => floats(2, 20, 8)), values: two(() => floats(2, 20, 8)) }
    await each('DEVICE_MISMATCH', /another device than the model/, { cache: KvCache.from(other, planes) })
    const batch = KvCache.from(device, { keys: two(() => floats(3, 2, 20, 8)), values: two(() => floats(3, 2, 20, 8)) })
    await each('INVALID_ARGUMENT', /^queries\[0\] is float32 \[4, 4, 8\]; expected \[S, H, m, d\] for 3 sequences/, { cache: batch })
  })

  it('refuse projections that are not there', async () => {
    const bare = AttentionModel.create(device, SHAPE)
    await each('UNSUPPORTED', /projection/, { model: bare })
    const kept = await evict(bare, cache, window, policies.snapkv({ keep: 0.5, window: 4 }))
    expect(kept.report.kept).toBe(40)
    bare.dispose()
  })

  it('refuse pages that do not exist', async () => {
    for (const id of [-1, 6, 2 ** 31 - 1]) {
      const pageTable = new Tensor('int32', Int32Array.of(0, 1, id, 3, 4), [1, 5])
      const planes = { keys: two(() => floats(6, 4, 2, 8)), values: two(() => floats(6, 4, 2, 8)) }
      const paged = KvCache.from(device, { ...planes, layout: 'NHD', pageTable, lengths: [20] })
      await each('OUT_OF_BOUNDS', new RegExp(`page ${id} of \\(layer 0, sequence 0, head 0, token 8\\)`), { cache: paged })
      // Behind the last token it may hold anything.
      const shorter = KvCache.from(device, { ...planes, layout: 'NHD', pageTable, lengths: [8] })
      expect((await selectFrom(model, shorter, window, policies.streaming({ keep: 0.5, recent: 0, sinks: 0 }))).entries).toBe(16)
    }
  })

  it('take fewer queries for shorter sequences, and none where none are looked at', async () => {
    const short = { keys: two(() => floats(2, 3, 8)), values: two(() => floats(2, 3, 8)) }
    const few: Window = { queries: two(() => floats(4, 3, 8)) }
    const scores = await score(model, KvCache.from(device, short), few, policy)
    expect(scores.data).toHaveLength(12)
    const streaming = policies.streaming({ keep: 0.5, sinks: 1, recent: 2 })
    const { selection } = await evict(model, cache, null, streaming)
    expect([...selection.kept(1, 0, 1)]).toEqual([0, 11, 12, 13, 14, 15, 16, 17, 18, 19])
  })

  it('use the last rows of a window that is longer than the policy looks back', async () => {
    const random = new Random(7)
    const filled = (...dims: number[]): Tensor<'float32'> => {
      const tensor = floats(...dims)
      for (let i = 0; i < tensor.size; i++) tensor.data[i] = random.normal()
      return tensor
    }
    const own = KvCache.from(device, { keys: two(() => filled(2, 20, 8)), values: two(() => filled(2, 20, 8)) })
    const queries = two(() => filled(4, 9, 8))
    const last = queries.map((tensor) => new Tensor('float32', tensor.data, [4, 4, 8], { strides: tensor.strides, offset: 5 * 8 }))
    const long = await score(model, own, { queries }, policy)
    expect(long.data.some((x) => x > 0)).toBe(true)
    expect(long.data).toEqual((await score(model, own, { queries: last }, policy)).data)
  })

  it('take float16 where a Float16Array is meant, and shared memory', async () => {
    const shared = (...dims: number[]): Tensor => {
      const size = dims.reduce((a, b) => a * b)
      return new Tensor('float16', new Uint16Array(new SharedArrayBuffer(size * 2)).fill(0x3c00), dims)
    }
    const half = KvCache.from(device, { keys: two(() => shared(2, 20, 8)), values: two(() => shared(2, 20, 8)) })
    const scores = await score(model, half, { queries: two(() => shared(4, 4, 8)) }, policy)
    expect(scores.data.every((x) => x > 0)).toBe(true)
  })
})

describe('Scores.from', () => {
  const given: ScoresDescription = { layers: 1, kvHeads: 2, lengths: [2, 3], data: new Float32Array(5) }

  it.each<Case>([
    ['no layers', 'INVALID_ARGUMENT', /^layers is 0/, { layers: 0 }],
    ['no sequences', 'INVALID_ARGUMENT', /^sequences is 0/, { sequences: 0 }],
    ['lengths of other segments', 'INVALID_ARGUMENT', /^lengths has 3 numbers; expected one per segment, 2/, { lengths: [1, 2, 2] }],
    ['data of another size', 'INVALID_ARGUMENT', /^data is Float32Array\(4\); expected Float32Array\(5\)/, { data: new Float32Array(4) }],
    ['data of another type', 'INVALID_ARGUMENT', /^data is Float64Array\(5\)/, { data: new Float64Array(5) }],
    [
      'positions of another size',
      'INVALID_ARGUMENT',
      /^positions is Int32Array\(4\); expected Int32Array\(5\)/,
      { positions: new Int32Array(4), contextLengths: [9] },
    ],
    ['positions without contexts', 'INVALID_ARGUMENT', /^contextLengths is missing/, { positions: new Int32Array(5) }],
    ['contexts of other sequences', 'INVALID_ARGUMENT', /^contextLengths has 2 numbers/, { positions: new Int32Array(5), contextLengths: [9, 9] }],
    ['half a byte', 'INVALID_ARGUMENT', /^bytesPerEntry is 0.5/, { bytesPerEntry: 0.5 }],
  ])('refuses %s', (_, code, message, change) => refuses(() => Scores.from({ ...given, ...change } as ScoresDescription), code, message))

  it('refuses data that may change its size', { skip: !('resizable' in ArrayBuffer.prototype) }, async () => {
    const buffer = Reflect.construct(ArrayBuffer, [20, { maxByteLength: 40 }]) as ArrayBuffer
    await refuses(() => Scores.from({ ...given, data: new Float32Array(buffer, 0, 5) }), 'INVALID_ARGUMENT', /^data is .* of fixed length/)
  })

  it('shows its segments', async () => {
    const scores = Scores.from({ ...given, data: Float32Array.of(1, 2, 3, 4, 5) })
    expect([...scores.segment(0, 0, 1)]).toEqual([3, 4, 5])
    expect([...scores.offsets]).toEqual([0, 2, 5])
    expect(scores.ms).toBe(0)
    await refuses(() => scores.segment(0, 1, 0), 'OUT_OF_BOUNDS', /^\(layer, sequence, head\) is \(0, 1, 0\); expected each below \(1, 1, 2\)/)
    await refuses(() => Scores.from(null as never), 'INVALID_ARGUMENT', /^description is null/)
  })
})

describe('select', () => {
  const scores = Scores.from({ layers: 1, kvHeads: 1, lengths: [10], data: Float32Array.from({ length: 10 }, (_, i) => i) })
  const half = policies.laprox({ keep: 0.5, sinks: 0, recent: 0 })

  it('refuses what cannot be', async () => {
    await refuses(() => select({} as Scores, half), 'INVALID_ARGUMENT', /^scores is \{\}; expected Scores/)
    await refuses(() => select(scores, {} as typeof half), 'INVALID_ARGUMENT', /./)
    await refuses(() => select(scores, half, { device: {} as Device }), 'INVALID_ARGUMENT', /^device is \{\}; expected a Device/)
    await refuses(() => select(scores, { ...half, recent: 6 }, { device }), 'BUDGET_TOO_SMALL', /is 5 of 10 entries, but 6 are protected/)
    await refuses(
      () => select(scores, { ...half, pooling: { kind: 'max', width: 4 } }, { device }),
      'INVALID_ARGUMENT',
      /width is 4; expected an odd integer/,
    )
    await refuses(() => select(scores, { ...half, budget: { ratio: 0 } }, { device }), 'INVALID_ARGUMENT', /ratio/)
    await refuses(() => select(scores, { ...half, budget: { bytes: 100 } }, { device }), 'INVALID_ARGUMENT', /bytes/)
    const broken = Scores.from({ layers: 1, kvHeads: 1, lengths: [2], data: Float32Array.of(1, Number.NaN) })
    await refuses(() => select(broken, half, { device }), 'NON_FINITE', /./)
  })

  it('needs no device of the caller', async () => {
    const [first, second] = await Promise.all([select(scores, half), select(scores, half, { progress: () => undefined })])
    expect([...first.tokens]).toEqual([...second.tokens])
    expect(first.entries).toBe(5)
  })
})

describe('compact', () => {
  const { cache } = ready()
  const choose = (counts: number[], tokens: number[]): Selection => Selection.from({ layers: 2, kvHeads: 2, counts, tokens: Int32Array.from(tokens) })
  const some = choose([1, 2, 0, 1], [3, 0, 19, 7])
  const pool = { target: 'pages', keys: [floats(9, 2, 8)], values: [floats(9, 2, 8)], freePages: Int32Array.of(8, 7, 6, 5) } as const

  it.each<readonly [string, LaproxErrorCode, RegExp, number[], number[]]>([
    [
      'tokens that do not exist',
      'OUT_OF_BOUNDS',
      /selected token 20 of \(layer 0, sequence 0, head 0\): expected ascending tokens below 20/,
      [1, 0, 0, 0],
      [20],
    ],
    ['negative tokens', 'OUT_OF_BOUNDS', /selected token -1/, [0, 1, 0, 0], [-1]],
    ['tokens out of order', 'OUT_OF_BOUNDS', /selected token 3 of \(layer 1/, [0, 0, 2, 0], [4, 3]],
    ['tokens chosen twice', 'OUT_OF_BOUNDS', /selected token 4/, [0, 0, 0, 2], [4, 4]],
  ])('refuses %s', (_, code, message, counts, tokens) => refuses(() => compact(cache, choose(counts, tokens)), code, message))

  it.each<Case>([
    ['an unknown target', 'INVALID_ARGUMENT', /^target is page; did you mean 'pages'/, { target: 'page' }],
    ['in place without positions', 'INVALID_ARGUMENT', /^target is 'in-place'; expected a cache with positions/, { target: 'in-place' }],
    ['no pool', 'INVALID_ARGUMENT', /^keys is missing/, { target: 'pages' }],
    [
      'too many pools',
      'INVALID_ARGUMENT',
      /^keys has 3 tensors; expected one pool for all layers, or one per layer, 2/,
      { ...pool, keys: [floats(9, 2, 8), floats(9, 2, 8), floats(9, 2, 8)] },
    ],
    ['values of fewer pools', 'INVALID_ARGUMENT', /^values has 1 tensors; expected one per layer, 2/, { ...pool, keys: two(() => floats(9, 2, 8)) }],
    ['a pool of another type', 'INVALID_ARGUMENT', /^keys\[0\] is float16 .*; expected type float32/, { ...pool, keys: [halves(9, 2, 8)] }],
    [
      'a pool of another shape',
      'INVALID_ARGUMENT',
      /^keys\[0\] is float32 \[9, 2, 2, 8\]; expected \[pages, pageSize, d\] = \[any, any, 8\]/,
      { ...pool, keys: [floats(9, 2, 2, 8)] },
    ],
    ['pages of no rows', 'INVALID_ARGUMENT', /pages of at least one token/, { ...pool, keys: [floats(9, 0, 8)], values: [floats(9, 0, 8)] }],
    ['values of another shape', 'INVALID_ARGUMENT', /^values\[0\] is float32 \[8, 2, 8\]/, { ...pool, values: [floats(8, 2, 8)] }],
    ['positions of another shape', 'INVALID_ARGUMENT', /^positions\[0\] is int32 \[9\]/, { ...pool, positions: [ints(9)] }],
    ['no free pages', 'INVALID_ARGUMENT', /^freePages is missing; expected an Int32Array/, { ...pool, freePages: undefined }],
    ['too many free lists', 'INVALID_ARGUMENT', /^freePages has 3 lists/, { ...pool, freePages: [pool.freePages, pool.freePages, pool.freePages] }],
    ['free pages that do not exist', 'OUT_OF_BOUNDS', /page 9/, { ...pool, freePages: Int32Array.of(0, 1, 9) }],
    ['negative free pages', 'OUT_OF_BOUNDS', /page -1/, { ...pool, freePages: Int32Array.of(-1, 1, 2) }],
    ['too few free pages', 'OUT_OF_PAGES', /free list of all layers has 2 pages/, { ...pool, freePages: Int32Array.of(0, 1) }],
    ['a free page listed twice', 'OVERLAP', /listed twice/, { ...pool, freePages: Int32Array.of(1, 1, 2) }],
    ['keys and values in one place', 'OVERLAP', /overlap/, { ...pool, values: pool.keys }],
    [
      'positions among the keys',
      'OVERLAP',
      /^positions\[0\] shares memory/,
      { ...pool, positions: [new Tensor('int32', new Int32Array(pool.keys[0].data.buffer, 0, 18), [9, 2])] },
    ],
    [
      'norms among the keys',
      'OVERLAP',
      /^valueNorms\[0\] shares memory/,
      { ...pool, valueNorms: [new Tensor('float32', pool.keys[0].data.subarray(0, 18), [9, 2])] },
    ],
    [
      'pages of the cache itself',
      'OVERLAP',
      /overlap/,
      {
        ...pool,
        keys: [new Tensor('float32', cache.keys(0).data as Float32Array, [20, 2, 8])],
        values: [floats(20, 2, 8)],
        freePages: Int32Array.of(0, 1, 2),
      },
    ],
  ])('refuses %s', async (_, code, message, options) => {
    await refuses(() => compact(cache, some, options as object), code, message)
    expect(pool.keys[0].data.every((x) => x === 0)).toBe(true)
    expect(cache.disposed).toBe(false)
  })

  it('refuses what is no cache, no selection, or one of another shape', async () => {
    await refuses(() => compact({} as KvCache, some), 'INVALID_ARGUMENT', /^cache is/)
    await refuses(() => compact(cache, {} as Selection), 'INVALID_ARGUMENT', /^selection is/)
    await refuses(() => compact(cache, some, null as never), 'INVALID_ARGUMENT', /^options is null/)
    const flat = Selection.from({ layers: 1, kvHeads: 2, counts: [0, 0], tokens: new Int32Array(0) })
    await refuses(() => compact(cache, flat), 'INVALID_ARGUMENT', /^selection: layers is 1; expected that of the cache, 2/)
    await refuses(() => choose([1], [1]), 'INVALID_ARGUMENT', /^counts has 1 numbers; expected one per segment, 4/)
    await refuses(() => choose([1, 0, 0, 0], [1, 2]), 'INVALID_ARGUMENT', /^tokens is Int32Array\(2\); expected Int32Array\(1\)/)
    await refuses(() => choose([1, -1, 0, 0], []), 'INVALID_ARGUMENT', /^counts\[1\] is -1/)
  })

  it('takes selections from elsewhere, empty ones too', async () => {
    expect(some.report).toMatchObject({ kept: 4 })
    expect([...some.counts]).toEqual([1, 2, 0, 1])
    const kept = await compact(cache, some)
    expect(kept).toMatchObject({ kind: 'ragged', entries: 4, bytes: 4 * 64, hasPositions: true })
    expect([...kept.positions(0).data]).toEqual([3, 0, 19])
    expect([...kept.positions(1).data]).toEqual([7])
    expect([...kept.contextLengths()!]).toEqual([20])
    const paged = await compact(cache, some, { ...pool, keys: [floats(9, 2, 8)], values: [floats(9, 2, 8)] })
    expect(paged).toMatchObject({ kind: 'paged', entries: 4, pagesUsed: [3] })
    expect([...paged.pageTable(0).data]).toEqual([8, 7])
    expect([...paged.pageTable(1).data]).toEqual([-1, 6])
    for (const target of [{}, { ...pool, freePages: new Int32Array(0) }]) {
      const none = await compact(cache, choose([0, 0, 0, 0], []), target)
      expect(none.entries).toBe(0)
      expect([...none.lengths(1)]).toEqual([0, 0])
    }
  })

  it('in place disposes of what is no longer true', async () => {
    const positions = two(
      () =>
        new Tensor(
          'int32',
          Int32Array.from({ length: 40 }, (_, i) => i % 20),
          [2, 20],
        ),
    )
    const keys = two(() => floats(2, 20, 8))
    const own = KvCache.from(device, { keys, values: two(() => floats(2, 20, 8)), positions, contextLengths: [20] })
    await refuses(() => compact(own, choose([1, 0, 0, 0], [25]), { target: 'in-place' }), 'OUT_OF_BOUNDS', /./)
    expect(own.disposed).toBe(false)
    const kept = await compact(own, some, { target: 'in-place' })
    expect(own.disposed).toBe(true)
    expect(kept).toMatchObject({ kind: 'contiguous', entries: 4, freedPages: undefined })
    expect(kept.keys(0)).toBe(keys[0])
    expect([...kept.positions(0).at(1).data.subarray(20, 22)]).toEqual([0, 19])
  })
})

describe('where there is no memory', () => {
  it('calls fail and change nothing', async () => {
    // 2^47 entries, all of them one row.
    const heads = 2 ** 16
    const row = new Tensor('float32', new Float32Array(8), [heads, 2 ** 31 - 1, 8], { strides: [0, 0, 1] })
    const huge = KvCache.from(device, { keys: [row], values: [row] })
    const model = AttentionModel.create(device, { layers: 1, queryHeads: heads, kvHeads: heads, headDim: 8 })
    const all = policies.streaming({ keep: 1 })
    const message = /takes \d{15} bytes, which could not be allocated/
    await refuses(() => score(model, huge, null, all), 'OUT_OF_MEMORY', message)
    await refuses(() => selectFrom(model, huge, null, all), 'OUT_OF_MEMORY', message)
    await refuses(() => evict(model, huge, null, all), 'OUT_OF_MEMORY', message)
    expect(huge.entries).toBe(heads * (2 ** 31 - 1))
    model.dispose()
  })
})
