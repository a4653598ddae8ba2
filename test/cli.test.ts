import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, readdir, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { run } from '../lib/cli/program.js'
import { Progress } from '../lib/cli/progress.js'
import { bytes, duration, table } from '../lib/cli/table.js'
import { timing } from '../lib/cli/timing.js'
import { evict, fidelity, policies, presetNames, readCapture, readSafetensors, writeSafetensors } from '../lib/index.js'
import { captureMetadata, captureTensors } from './support/capture.js'

const main = fileURLToPath(new URL('../dist/cli/main.js', import.meta.url))

let folder: string
let capture: string

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'laprox-cli-'))
  capture = join(folder, 'prompt.safetensors')
  await writeSafetensors(capture, captureTensors({ later: 4 }), { ...captureMetadata, model: 'tiny' })
})

afterAll(() => rm(folder, { recursive: true }))

/** A stream that keeps what is written, as a terminal or not. */
function stream(isTTY = false) {
  let text = ''
  const write = (more: string): boolean => {
    text += more
    return true
  }
  return {
    isTTY,
    columns: 80,
    write,
    clearLine: () => write('\r'),
    cursorTo: () => true,
    get text() {
      return text
    },
  }
}

/** Runs a command line in this process. */
async function laprox(args: readonly string[], { tty = false, signal = new AbortController().signal } = {}) {
  const [stdout, stderr] = [stream(), stream(tty)]
  const code = await run(args, { stdout, stderr: stderr as never, signal })
  return { code, out: stdout.text, err: stderr.text }
}

/** Runs a command line in its own, with pipes. */
function spawnLaprox(args: readonly string[], env: Readonly<Record<string, string>> = {}) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [main, ...args], { encoding: 'utf8', env: { ...process.env, ...env } })
  return { code: status, out: stdout, err: stderr }
}

describe('the executable', () => {
  it('writes results to stdout, and nothing else anywhere', () => {
    const { code, out, err } = spawnLaprox(['evict', capture, '--keep', '30%', '--json'])
    expect({ code, err }).toEqual({ code: 0, err: '' })
    expect(JSON.parse(out)).toMatchObject({ report: { entries: 1200, kept: 360 } })
  })

  it('tells its version and its commands', () => {
    expect(spawnLaprox(['--version'])).toEqual({ code: 0, out: '0.1.0\n', err: '' })
    const { code, out } = spawnLaprox(['--help'])
    expect(code).toBe(0)
    for (const command of ['info', 'evict', 'compare', 'bench']) expect(out).toContain(`\n  ${command} `)
    expect(spawnLaprox([])).toMatchObject({ code: 2, out: '', err: expect.stringContaining('Usage: laprox') })
  })

  it('says what to do where the native library is missing, and its version all the same', () => {
    const env = { LAPROX_NATIVE_PATH: join(folder, 'nowhere.node') }
    const { code, out, err } = spawnLaprox(['info'], env)
    expect({ code, out }).toEqual({ code: 1, out: '' })
    expect(err).toMatch(/^error: laprox's native library could not be loaded.*LAPROX_NATIVE_PATH is set.*\(NATIVE_MISSING\)\n$/s)
    expect(spawnLaprox(['--version'], env).code).toBe(0)
  })

  it('ends quietly when nobody reads on', async () => {
    const child = spawn(process.execPath, [main, 'compare', capture, '--keep', '30%', '--json'])
    let err = ''
    child.stderr.on('data', (data) => {
      err += data
    })
    child.stdout.destroy()
    const [code] = await once(child, 'exit')
    expect({ code, err }).toEqual({ code: 0, err: '' })
  })
})

describe('laprox info', () => {
  it('tells versions, devices and why there is no GPU', async () => {
    const { code, out } = await laprox(['info'])
    expect(code).toBe(0)
    expect(out).toMatch(/^laprox +0\.1\.0 \(ABI \d+\)\nnode +v/)
    expect(out).toMatch(/\ncpu +\d+ threads?, /)
    const json = JSON.parse((await laprox(['info', '--json'])).out)
    expect(json).toMatchObject({ laprox: '0.1.0', node: process.version, devices: [{ backend: 'cpu' }], backends: [{ available: true }, {}] })
    const { available, reason } = json.backends[1]
    expect(out).toContain(available ? 'cuda:0' : `not available: ${reason}`)
  })
})

describe('laprox evict', () => {
  it('writes what the library keeps, with its positions and where it comes from', async () => {
    const out = join(folder, 'kept.safetensors')
    const { code } = await laprox(['evict', capture, '--keep', '30%', '--policy', 'adakv', '--window', '8', '--out', out, '--device', 'cpu'])
    expect(code).toBe(0)
    using read = await readCapture(capture)
    const { cache } = await evict(read.model, read.cache, read.window, policies.adakv({ keep: 0.3, window: 8 }))
    const { tensors, metadata } = await readSafetensors(out)
    for (const layer of [0, 1]) {
      expect(tensors.get(`layers.${layer}.keys`)).toMatchObject({ dims: cache.keys(layer).dims, type: 'float32' })
      expect(tensors.get(`layers.${layer}.keys`)!.data).toEqual(cache.keys(layer).data)
      expect(tensors.get(`layers.${layer}.values`)!.data).toEqual(cache.values(layer).data)
      expect(tensors.get(`layers.${layer}.positions`)!.data).toEqual(cache.positions(layer).data)
      expect(tensors.get(`layers.${layer}.lengths`)!.data).toEqual(cache.lengths(layer))
    }
    expect(metadata).toMatchObject({ 'laprox.kept': '1', capture: 'prompt.safetensors', model: 'tiny', context_length: '300' })
    expect(JSON.parse(metadata.policy!)).toEqual(policies.adakv({ keep: 0.3, window: 8 }))
  })

  it('prints a table, or JSON', async () => {
    const { out } = await laprox(['evict', capture, '--keep', '0.3'])
    expect(out).toContain('tiny, 2 layers, 4 query heads, 2 KV heads of 24, 300 tokens, float32')
    expect(out).toContain('1,200, kept 360 (30 %), of these 144 protected')
    expect(out).toMatch(/bytes +230 kB, kept 69\.1 kB/)
    const json = JSON.parse((await laprox(['evict', capture, '--keep', '30%', '--threads', '1', '--device', 'cpu', '--json'])).out)
    expect(json).toMatchObject({
      capture: { file: capture, model: 'tiny', layers: 2, queryHeads: 4, kvHeads: 2, headDim: 24, tokens: 300, queries: 32, laterQueries: 4 },
      device: { name: 'cpu', threads: 1 },
      policy: { name: 'laprox', budget: { ratio: 0.3 } },
      report: { entries: 1200, kept: 360 },
    })
    expect(json.ms).toBeGreaterThan(0)
  })

  it('tells how far the output moves', async () => {
    using read = await readCapture(capture)
    const { model, cache, window, later } = read
    const { selection } = await evict(model, cache, window, policies.laprox({ keep: 0.3 }))
    const expected = await fidelity(model, cache, selection, window, { later })
    expect(JSON.parse((await laprox(['evict', capture, '--keep', '30%', '--json'])).out).fidelity).toEqual(expected)
    const { out } = await laprox(['evict', capture, '--keep', '30%'])
    expect(out).toMatch(/\noutput error +[\d.]+ % over the last 32 queries \(layer [01]: [\d.]+ %\), [\d.]+ % over 4 later ones \(layer/)
  })

  it('writes a page that shows what was kept', async () => {
    const page = join(folder, 'report.html')
    const { code, out } = await laprox(['evict', capture, '--keep', '30%', '--report', page])
    expect(code).toBe(0)
    expect(out).toMatch(/\nreport +.*report\.html, \d+ kB\n$/)
    expect(await readFile(page, 'utf8')).toContain('<title>What laprox keeps of tiny</title>')
    const json = JSON.parse((await laprox(['evict', capture, '--keep', '30%', '--report', page, '--json'])).out)
    expect(json.page).toMatchObject({ file: page, thinned: [] })
  })

  it('does without later queries and with one layer', async () => {
    const small = join(folder, 'small.safetensors')
    await writeSafetensors(small, captureTensors({ layers: 1 }), captureMetadata)
    expect((await laprox(['evict', small, '--keep', '30%'])).out).toMatch(/\noutput error +[\d.]+ % over the last 32 queries\n$/)
    expect((await laprox(['compare', small, '--keep', '30%'])).out).toMatch(/over the last 32 queries\.\n/)
  })
})

describe('laprox compare', () => {
  const line = ['compare', '--policy', 'laprox,knorm,streaming', '--keep', '30%,50%'] as const

  it('tells how much the policies agree on', async () => {
    const { code, out } = await laprox([...line, capture, '--json'])
    expect(code).toBe(0)
    const { results, overlaps } = JSON.parse(out)
    expect(results.map(({ policy, keep }: { policy: { name: string }; keep: number }) => [policy.name, keep])).toEqual(
      [0.3, 0.5].flatMap((keep) => ['laprox', 'knorm', 'streaming'].map((name) => [name, keep])),
    )
    using read = await readCapture(capture)
    const { model, cache, window } = read
    const kept = async (policy: ReturnType<typeof policies.laprox>): Promise<Set<string>> => {
      const { selection } = await evict(model, cache, window, policy)
      const entries = [0, 1].flatMap((layer) =>
        [0, 1].flatMap((head) => [...selection.kept(layer, 0, head)].map((token) => `${layer} ${head} ${token}`)),
      )
      return new Set(entries)
    }
    const [a, b] = [await kept(policies.laprox({ keep: 0.5 })), await kept(policies.knorm({ keep: 0.5 }))]
    const both = [...a].filter((entry) => b.has(entry)).length
    expect(overlaps[1]).toMatchObject({ keep: 0.5, policies: ['laprox', 'knorm', 'streaming'] })
    expect(overlaps[1].shares[0][0]).toBe(1)
    expect(overlaps[1].shares[0][1]).toBe(both / a.size)
    expect(overlaps[1].shares[1][0]).toBe(both / b.size)
    const { selection } = await evict(model, cache, window, policies.knorm({ keep: 0.5 }))
    expect(results[4].fidelity).toEqual(await fidelity(model, cache, selection, window, { later: read.later }))
  })

  it('prints tables', async () => {
    const { out } = await laprox([...line, capture])
    expect(out).toMatch(/\nlaprox 30 % +360 +[\d.]+ % +[\d.]+ % /)
    expect(out).toContain("\nError: of the layers' outputs, relative to the full cache's, over the last 32 queries, and over 4 later ones.\n")
    expect(out).toContain('Of the 50 % that each row keeps, the share that the column keeps, too:')
    expect((await laprox(['compare', capture, '--policy', 'random', '--keep', '30%'])).out).not.toContain('Of the')
  })
})

describe('laprox bench', () => {
  const line = ['bench', '--tokens', '256', '--query-heads', '4', '--kv-heads', '2', '--head-dim', '24', '--keep', '30%'] as const

  it('times the stages', async () => {
    const { code, out } = await laprox([...line, '--layers', '2', '--dtype', 'float16', '--json'])
    expect(code).toBe(0)
    const json = JSON.parse(out)
    expect(json.cache).toEqual({ tokens: 256, layers: 2, queryHeads: 4, kvHeads: 2, headDim: 24, dtype: 'float16', entries: 1024 })
    expect(Object.keys(json.stages)).toEqual(['score', 'select', 'compact', 'evict'])
    for (const { msMedian, msP10, msP90, samples, entriesPerSecond } of Object.values<Record<string, number>>(json.stages)) {
      expect(samples).toBe(7)
      expect(msP10).toBeLessThanOrEqual(msMedian!)
      expect(msMedian).toBeLessThanOrEqual(msP90!)
      expect(entriesPerSecond).toBeCloseTo(1024 / (msMedian! / 1000))
    }
    expect((await laprox(line)).out).toMatch(/cache +1 layer, 4 query heads, 2 KV heads of 24, 256 tokens, bfloat16, 512 entries, 49\.2 kB\n/)
  })
})

describe('help', () => {
  it.each(['info', 'evict', 'compare', 'bench'])('of %s shows an example and the exit codes', async (command) => {
    const { code, out, err } = await laprox([command, '--help'])
    expect({ code, err }).toEqual({ code: 0, err: '' })
    expect(out).toContain(`\nExample:\n  laprox ${command}`)
    expect(out).toContain('\nExit codes:\n  0 ')
  })
})

describe('a command line that cannot be', () => {
  const outputs = ['--out', 'y', '--report', './y']

  it.each<[args: string[], message: string]>([
    [['evcit'], "unknown command 'evcit'\n(Did you mean evict?)"],
    [['evict', 'x', '--kep', '5%'], "unknown option '--kep'\n(Did you mean --keep?)"],
    [['evict'], "missing required argument 'capture'"],
    [['info', 'more'], 'too many arguments'],
    [['evict', 'x', '--keep'], "option '--keep <share>' argument missing"],
    [['evict', 'x', '--keep', '5'], "argument '5' is invalid. Expected a share of the cache, such as 5% or 0.05; did you mean 5%?"],
    [['evict', 'x', '--keep', '0'], 'Expected a share of the cache, such as 5% or 0.05\n'],
    [['evict', 'x', '--keep', ' '], 'Expected a share'],
    [['evict', 'x', '--keep', '120%'], 'Expected a share'],
    [['evict', 'x', '--policy', 'lapros'], "'lapros' is no policy; did you mean 'laprox'? Known: laprox, laprox-bound,"],
    [['evict', 'x', '--device', 'gpu'], "'gpu' is no device; did you mean 'cpu'? Known: auto, cpu, cuda, cuda:0"],
    [['evict', 'x', '--threads', '0'], 'Expected an integer of at least 1'],
    [['evict', 'x', '--threads', '1.5'], 'Expected an integer of at least 1'],
    [['evict', 'x', '--window', '500'], 'options of laprox: window is 500; expected an integer from 1 to 128 (INVALID_ARGUMENT)'],
    [['evict', 'x', ...outputs], '--report ./y is the file of --out, too'],
    [['evict', 'x', '--out', 'x'], '--out x is the file of the capture, too'],
    [['compare', 'x', '--policy', 'laprox,,adakv'], 'The list has an empty item'],
    [['compare', 'x', '--policy', 'laprox,snap-kw'], "did you mean 'snapkv'?"],
    [['bench', '--dtype', 'int8'], 'Allowed choices are bfloat16, float16, float32.'],
    [['bench', '--head-dim', '16'], 'Expected a multiple of 8 from 24 to 256'],
    [['bench', '--query-heads', '5', '--kv-heads', '2'], 'queryHeads is 5; expected a multiple of kvHeads, 2 (INVALID_ARGUMENT)'],
  ])('%j', async (args, message) => {
    const { code, out, err } = await laprox(args)
    expect({ code, out }).toEqual({ code: 2, out: '' })
    expect(err).toContain(message)
    expect(err).not.toContain('    at ')
  })

  it('keeps less than what is protected, or looks at more queries than there are', async () => {
    expect(await laprox(['evict', capture, '--keep', '1%'])).toMatchObject({
      code: 2,
      err: expect.stringMatching(/^error: .* \(BUDGET_TOO_SMALL\)\n$/),
    })
    expect(await laprox(['evict', capture, '--window', '64'])).toMatchObject({
      code: 2,
      err: expect.stringContaining('queries have 32 rows; expected the last 64'),
    })
  })

  it('lists every policy there is', async () => {
    const { err } = await laprox(['evict', 'x', '--policy', '?'])
    for (const name of presetNames) expect(err).toContain(name)
  })
})

describe('a failure', () => {
  async function expectFailure(args: readonly string[], message: string): Promise<void> {
    const before = (await readdir(folder)).sort()
    const { code, out, err } = await laprox(args)
    expect({ code, out }).toEqual({ code: 1, out: '' })
    expect(err).toMatch(/^error: .* \([A-Z_]+\)\n$/)
    expect(err).toContain(message)
    expect((await readdir(folder)).sort()).toEqual(before)
  }

  it('names a file that is missing, truncated, of another kind, or lacks a tensor', async () => {
    await expectFailure(['evict', join(folder, 'none')], 'ENOENT')
    await expectFailure(['evict', folder], 'no regular file')
    const bad = join(folder, 'bad')
    await writeFile(bad, 'not this')
    await expectFailure(['compare', bad], 'bad is no safetensors file')
    const tensors = captureTensors()
    await writeSafetensors(bad, tensors, captureMetadata)
    await truncate(bad, 50_000)
    await expectFailure(['compare', bad], 'truncated')
    tensors.delete('layers.1.queries')
    await writeSafetensors(bad, tensors, captureMetadata)
    await expectFailure(['evict', bad], "has no tensor 'layers.1.queries'")
  })

  it('of an output is found before the work begins', async () => {
    const out = join(folder, 'none', 'kept.safetensors')
    // The capture is not there either, and would be missed first by whoever looks for it first.
    await expectFailure(['evict', join(folder, 'missing'), '--out', out], `${out} could not be written: ENOENT`)
    await expectFailure(['evict', join(folder, 'missing'), '--report', folder], 'it is a folder')
  })

  it('of a disk that takes no more leaves the old file', async () => {
    const out = join(folder, 'full.safetensors')
    await writeFile(out, 'old')
    const before = (await readdir(folder)).sort()
    // The shell's limit, in blocks of 512 bytes, stands in for a full disk.
    const line = `ulimit -f 16; exec "${process.execPath}" "${main}" evict "${capture}" --keep 90% --out "${out}"`
    const { status, stdout, stderr } = spawnSync('sh', ['-c', line], { encoding: 'utf8' })
    expect({ status, stdout }).toEqual({ status: 1, stdout: '' })
    expect(stderr).toBe(`error: ${out} could not be written: EFBIG: file too large, write (IO)\n`)
    expect((await readdir(folder)).sort()).toEqual(before)
  })

  it('of a device that is not there says so', async () => {
    const { code, err } = await laprox(['evict', capture, '--device', 'cuda:9999'])
    expect(code).toBe(1)
    expect(err).toContain('(NO_DEVICE)')
  })

  it('for lack of memory is told before it happens', async () => {
    await expectFailure(['bench', '--tokens', '2000000000'], 'the cache would take 8.19 TB; the machine has')
  })

  it('that is a defect shows where', async () => {
    const broken = {
      write: () => Promise.reject(new Error('x')),
      get text(): never {
        throw new TypeError('a defect')
      },
    }
    const stdout = { write: (): never => void broken.text as never }
    await expect(run(['info'], { stdout, stderr: stream() as never, signal: new AbortController().signal })).rejects.toThrow('a defect')
  })
})

describe('an interruption', () => {
  it('ends the command with its own exit code', async () => {
    expect(await laprox(['evict', capture], { signal: AbortSignal.abort(143) })).toEqual({ code: 143, out: '', err: '' })
    expect(await laprox(['bench'], { signal: AbortSignal.abort(130) })).toEqual({ code: 130, out: '', err: '' })
  })

  /** Starts an eviction whose first write waits for so many milliseconds, and waits until it has begun. */
  async function writing(out: string, ms: number): Promise<ChildProcess> {
    const slow = `
      import { open } from 'node:fs/promises'
      const handle = await open(process.execPath)
      const prototype = Object.getPrototypeOf(handle)
      await handle.close()
      const { writev } = prototype
      prototype.writev = async function (...given) {
        process.stdout.write('writing')
        await new Promise((resolve) => setTimeout(resolve, ${ms}))
        return writev.apply(this, given)
      }`
    const preload = `data:text/javascript,${encodeURIComponent(slow)}`
    const child = spawn(process.execPath, ['--import', preload, main, 'evict', capture, '--keep', '30%', '--out', out], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    await once(child.stdout, 'data')
    return child
  }

  it.each([
    ['SIGINT', 130],
    ['SIGTERM', 143],
  ] as const)('by %s leaves no broken file', async (signal, code) => {
    const out = join(folder, `${signal}.safetensors`)
    const before = (await readdir(folder)).sort()
    const child = await writing(out, 300)
    expect((await readdir(folder)).length).toBe(before.length + 1)
    child.kill(signal)
    expect(await once(child, 'exit')).toEqual([code, null])
    expect((await readdir(folder)).sort()).toEqual(before)
  })

  it('that comes twice ends at once, and leaves no broken file either', async () => {
    const before = (await readdir(folder)).sort()
    const child = await writing(join(folder, 'twice.safetensors'), 60_000)
    child.kill('SIGINT')
    await new Promise((resolve) => setTimeout(resolve, 200))
    expect(child.exitCode).toBeNull()
    child.kill('SIGINT')
    expect(await once(child, 'exit')).toEqual([130, null])
    expect((await readdir(folder)).sort()).toEqual(before)
  })
})

describe('progress', () => {
  it('is shown on a terminal and taken away again, and nowhere else', async () => {
    const { out, err } = await laprox(['evict', capture, '--keep', '30%'], { tty: true })
    expect(err).toMatch(/█{30} 100 % {2}reading/)
    expect(err.endsWith('\r')).toBe(true)
    expect(out).not.toContain('█')
    expect((await laprox(['evict', capture, '--keep', '30%'])).err).toBe('')
  })

  it('tells the time left, and never wraps', () => {
    const terminal = stream(true)
    const bar = new Progress(10, terminal as never)
    bar.update(5, 'half')
    expect(terminal.text).toMatch(/^\r█{15}░{15} 50 % {2}half {2}\d+ s left$/)
    bar.update(10, 'x'.repeat(200))
    expect(terminal.text.split('\r').at(-1)).toHaveLength(79)
  })
})

describe('tables', () => {
  it('align, and know units', () => {
    expect(
      table([
        ['a', '1'],
        ['bbb', '22'],
      ]),
    ).toBe('a      1\nbbb   22')
    expect([999, 1000, 1_257_472, 2.5e9, 3e15].map(bytes)).toEqual(['999 B', '1.00 kB', '1.26 MB', '2.50 GB', '3000 TB'])
    expect([0.1234, 12.34, 999.9, 1234.5].map(duration)).toEqual(['0.12 ms', '12.3 ms', '1000 ms', '1.23 s'])
  })

  it('have quantiles in them', () => {
    expect(timing([3, 1, 2])).toEqual({ msMedian: 2, msP10: 1.2, msP90: 2.8, samples: 3 })
  })
})
