import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { fill, outdated } from '../scripts/check-figures.js'

const root = resolve(import.meta.dirname, '..')

/** What README says of an eviction on a GPU: whatever the results are today. */
const eviction = /<!-- figures: gpu-eviction -->([\d.]+) ms/.exec(readFileSync(join(root, 'README.md'), 'utf8'))![1]!

describe('the documentation', () => {
  let copy: string
  beforeEach(() => {
    copy = mkdtempSync(join(tmpdir(), 'laprox-figures-'))
    for (const part of ['README.md', 'docs', 'bench/results']) cpSync(join(root, part), join(copy, part), { recursive: true })
    cpSync(join(root, 'examples/needle/README.md'), join(copy, 'examples/needle/README.md'))
  })
  afterEach(() => rmSync(copy, { recursive: true }))

  /** Changes a file of the copy; the text that stood there. */
  function change(file: string, from: string, to: string): string {
    const text = readFileSync(join(copy, file), 'utf8')
    expect(text).toContain(from)
    writeFileSync(join(copy, file), text.replace(from, to))
    return text
  }

  it('holds the figures of the results', () => {
    expect(outdated(copy)).toEqual([])
  })

  it.each([
    ['a figure in a sentence', 'README.md', `<!-- figures: gpu-eviction -->${eviction} ms`, '<!-- figures: gpu-eviction -->3.9 ms'],
    ['a cell of a table', 'README.md', '| every joint score | ', '| every joint score | 1'],
    ['a page', 'docs/benchmarks.md', '| met |', '| **not met** |'],
    ['a chart', 'docs/benchmarks-gpu.svg', `${eviction} ms`, '3.9 ms'],
  ])('is outdated when %s is changed, and what is to be written is what was there', (_, file, from, to) => {
    const text = change(file, from, to)
    const found = outdated(copy)
    expect(found).toMatchObject([{ file, text }])
    expect(found[0]!.why).toContain(to.slice(-6))
  })

  it('is outdated when a result is another', () => {
    const results = JSON.parse(readFileSync(join(copy, 'bench/results/h200.json'), 'utf8'))
    for (const result of results.results) if (result.stage === 'evict-kept-norms') result.medianUs *= 2
    writeFileSync(join(copy, 'bench/results/h200.json'), JSON.stringify(results))
    const { medianUs } = results.results.find(
      ({ model, n, stage, input, kernels }: Record<string, unknown>) =>
        model === 'Llama-3.1-8B' && n === 131072 && stage === 'evict-kept-norms' && input === 'peaked' && kernels === undefined,
    )
    const found = outdated(copy)
    expect(found.map(({ file }) => file)).toEqual(['docs/benchmarks-gpu.md', 'docs/benchmarks-gpu.svg', 'README.md'])
    expect(found.at(-1)!.text).not.toContain(`<!-- figures: gpu-eviction -->${eviction} ms`)
    expect(found.at(-1)!.text).toContain(`<!-- figures: gpu-eviction -->${(medianUs / 1000).toPrecision(2)} ms<!-- /figures -->`)
  })
})

describe('a document', () => {
  const figures = { speed: () => '4 ms', table: () => '| a |\n| --- |' }

  it('has a table on lines of its own, and a figure in its sentence', () => {
    const [filled] = fill('A.md', 'in <!-- figures: speed --><!-- /figures -->:\n<!-- figures: table --><!-- /figures -->\n', figures)
    const text = 'in <!-- figures: speed -->4 ms<!-- /figures -->:\n<!-- figures: table -->\n| a |\n| --- |\n<!-- /figures -->\n'
    expect(filled!.text).toBe(text)
    expect(fill('A.md', text, figures)).toEqual([])
  })

  it('may not mark figures that there are not', () => {
    expect(() => fill('A.md', '<!-- figures: sped -->3 ms<!-- /figures -->', figures)).toThrow(
      "A.md: there are no figures 'sped'; did you mean 'speed'?",
    )
    expect(() => fill('A.md', '<!-- figures: toString -->3 ms<!-- /figures -->', figures)).toThrow("no figures 'toString'")
  })

  it.each([
    '<!-- figures: speed -->3 ms',
    '<!-- figures: speed -->3 ms <!-- figures: table --><!-- /figures -->',
    '<!-- figures -->3 ms<!-- /figures -->',
  ])('may not leave a mark open: %s', (text) => {
    expect(() => fill('A.md', text, figures)).toThrow(/A\.md: .* has no end/)
  })
})
