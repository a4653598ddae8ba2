import { resolve } from 'node:path'
import { describe, expect, it } from 'vitest'
import type { Measurement, Results } from '../bench/measurement.js'
import { readOptions, readResults, UsageError } from '../bench/options.js'
import { pageFiles } from '../bench/page.js'
import { table } from '../bench/table.js'

const root = resolve(import.meta.dirname, '..')

describe('the command line of the benchmarks', () => {
  const options = (...args: string[]) => readOptions(args, ['score', 'select'])

  it('writes a whole run to where the repository keeps it, and no other', () => {
    const nowhere = { json: undefined, markdown: undefined }
    expect(options()).toMatchObject({ only: ['score', 'select'], json: 'bench/results/cpu.json', markdown: 'docs/benchmarks.md' })
    expect(options('--quick')).toMatchObject(nowhere)
    expect(options('--only', 'score')).toMatchObject({ only: ['score'], ...nowhere })
    expect(options('--only', 'score', '--json', 'a.json')).toMatchObject({ ...nowhere, json: 'a.json' })
    expect(options('--from', 'a.json')).toMatchObject({ json: undefined, markdown: 'docs/benchmarks.md' })
  })

  it('says what is wrong', async () => {
    expect(() => options('--only', 'scroe')).toThrow("there is no benchmark 'scroe'; did you mean 'score'? Known: score, select")
    expect(() => options('--threads', '0')).toThrow('--threads 0 is no number of threads')
    expect(() => options('--colour')).toThrow(UsageError)
    await expect(readResults('no/such.json', 'benchmark')).rejects.toThrow('--from no/such.json: ENOENT')
    await expect(readResults(resolve(root, 'bench/results/h200.json'), 'benchmark')).rejects.toThrow("expected results that each have a 'benchmark'")
  })
})

describe('a run', () => {
  const parameters = { kvHeads: 8, tokens: 4096, window: 32, threads: 2 }
  const timing = (ms: number) => ({ msMedian: ms, msP10: ms, msP90: ms, samples: 3 })
  const point = (name: string, along: string, value: number, ms: number): Measurement => ({
    benchmark: 'growth',
    name,
    along,
    parameters: { ...parameters, [along]: value },
    ...timing(ms),
  })
  const run: Results = {
    machine: { cpu: 'CPU', cores: 2, memoryGiB: 8, platform: 'linux-x64', node: 'v20', laprox: '0', instructionSet: 'avx2' },
    commit: 'abc',
    date: '2026-01-01T00:00:00Z',
    quick: false,
    results: [
      ...[1024, 2048].flatMap((tokens) => [point('score', 'tokens', tokens, tokens / 8), point('select', 'tokens', tokens, tokens / 1e4)]),
      ...[1, 2].map((window) => point('score', 'window', window, window)),
      point('score', 'threads', 1, 5),
      {
        benchmark: 'score',
        name: 'every score',
        parameters,
        ...timing(8),
        operations: 4e9,
        share: 0.5,
        machineRate: { value: 1e12, unit: 'operations', of: 'multiply-adds' },
      },
    ],
  }

  it('becomes a page with a chart for each parameter that grows', () => {
    const files = pageFiles('docs/b.md', run)
    expect([...files.keys()]).toEqual(['docs/b.md', 'docs/b-tokens.svg', 'docs/b-window.svg'])
    const page = files.get('docs/b.md')!
    expect([...page.matchAll(/!\[[^\]]*\]\((.*?)\)/g)].map(([, file]) => file)).toEqual(['b-tokens.svg', 'b-window.svg'])
    expect(page).toContain('| tokens | score (ms) | select (ms) |\n| --- | --- | --- |\n| 1,024 | 128 | 0.102 |\n| 2,048 | 256 | 0.205 |')
    expect(page).toContain('| every score | 8 ms | 500 GFLOP/s | 1000 GFLOP/s (multiply-adds) | 50 % |')
  })

  it('becomes a table for a terminal', () => {
    expect(table(run.results)).toContain('tokens   score, ms   select, ms\n  1024         128        0.102\n  2048         256        0.205\n')
  })
})
