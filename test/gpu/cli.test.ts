import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { run } from '../../lib/cli/program.js'
import { readSafetensors, type Tensor, writeSafetensors } from '../../lib/index.js'
import { captureMetadata, captureTensors } from '../support/capture.js'
import { device, onGpu } from './gpu.js'

let folder: string
let capture: string
const tensors = captureTensors({ later: 4, type: 'bfloat16' })

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'laprox-gpu-cli-'))
  capture = join(folder, 'prompt.safetensors')
  await writeSafetensors(capture, tensors, captureMetadata)
})

afterAll(() => rm(folder, { recursive: true }))

/** Keeps what is written. */
function writer() {
  const written: string[] = []
  return { isTTY: false, written, write: (text: string) => written.push(text) }
}

async function json(...args: string[]) {
  const [stdout, stderr] = [writer(), writer()]
  const code = await run([...args, '--device', 'cuda', '--json'], { stdout, stderr: stderr as never, signal: new AbortController().signal })
  expect({ code, errors: stderr.written }).toEqual({ code: 0, errors: [] })
  return JSON.parse(stdout.written.join(''))
}

onGpu('the command line', () => {
  it('laprox evict keeps rows of a capture by way of the GPU', async () => {
    const out = join(folder, 'kept.safetensors')
    const page = join(folder, 'report.html')
    const { device, report, fidelity, page: written } = await json('evict', capture, '--keep', '30%', '--out', out, '--report', page)
    expect(written).toMatchObject({ file: page, thinned: [] })
    expect(device.name).toBe('cuda:0')
    // Computed on the CPU.
    expect(fidelity.layers).toHaveLength(2)
    // Computed on the CPU.
    expect(fidelity.layers).toHaveLength(2)
    expect(report).toMatchObject({ entries: 1200, kept: 360 })
    const kept = (await readSafetensors(out)).tensors as ReadonlyMap<string, Tensor<'bfloat16'>>
    let rows = 0
    for (const layer of [0, 1]) {
      let row = 0
      const positions = kept.get(`layers.${layer}.positions`)!.data
      for (const [head, length] of [...kept.get(`layers.${layer}.lengths`)!.data].entries()) {
        for (let i = 0; i < length; i++, row++) {
          for (const kind of ['keys', 'values']) {
            const from = (tensors.get(`layers.${layer}.${kind}`)!.data as Uint16Array).subarray((head * 300 + positions[row]!) * 24).subarray(0, 24)
            expect(kept.get(`layers.${layer}.${kind}`)!.data.subarray(row * 24, (row + 1) * 24)).toEqual(from)
          }
        }
      }
      rows += row
    }
    expect(rows).toBe(360)
  })

  it('laprox compare and bench compute on the GPU', async () => {
    const { results, overlaps } = await json('compare', capture, '--policy', 'laprox,snapkv', '--keep', '50%')
    expect(results.map(({ report }: { report: { kept: number } }) => report.kept)).toEqual([600, 600])
    expect(overlaps[0].shares[0][0]).toBe(1)
    const { stages } = await json('bench', '--tokens', '256', '--query-heads', '4', '--kv-heads', '2', '--head-dim', '24', '--keep', '30%')
    expect(Object.keys(stages)).toEqual(['score', 'select', 'compact', 'evict'])
  })

  it('laprox info tells of the GPU', async () => {
    const stdout = writer()
    expect(await run(['info'], { stdout, stderr: process.stderr, signal: new AbortController().signal })).toBe(0)
    expect(stdout.written.join('')).toContain(`\ncuda:0   ${device.info().name}, ${device.info().instructionSet}`)
  })
})
