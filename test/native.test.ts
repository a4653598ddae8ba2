import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, expect, it, vi } from 'vitest'

const folder = mkdtempSync(join(tmpdir(), 'laprox-'))
afterAll(() => rmSync(folder, { recursive: true }))

const original = process.env.LAPROX_NATIVE_PATH
afterEach(() => {
  if (original === undefined) delete process.env.LAPROX_NATIVE_PATH
  else process.env.LAPROX_NATIVE_PATH = original
  vi.resetModules()
})

/** What loading the native library from `path` ends in. */
async function load(path: string): Promise<unknown> {
  process.env.LAPROX_NATIVE_PATH = path
  vi.resetModules()
  const { native } = await import('../lib/native.js')
  try {
    return native()
  } catch (error) {
    return error
  }
}

it('says where it looked and what to do', async () => {
  const missing = join(folder, 'nowhere.node')
  const error = await load(missing)
  expect(error).toMatchObject({ name: 'LaproxError', code: 'NATIVE_MISSING' })
  expect((error as Error).message).toContain(`${missing}: no such file`)
  expect((error as Error).message).toContain('LAPROX_NATIVE_PATH is set')
  expect((error as Error).message).toContain(`${process.platform}-${process.arch}`)
})

it('says why a file is no library', async () => {
  const path = join(folder, 'laprox.node')
  writeFileSync(path, 'not a library')
  for (const given of [path, folder]) {
    const error = await load(given)
    expect(error).toMatchObject({ code: 'NATIVE_MISSING' })
    expect((error as Error).message).toContain(`${path}: `)
    expect((error as Error).message).not.toContain('no such file')
  }
})

it('refuses a library of another version', async () => {
  const path = join(folder, 'old.cjs')
  writeFileSync(path, 'module.exports = { abiVersion: 0, bindingVersion: 1, version: "0.0.1" }')
  const error = await load(path)
  expect(error).toMatchObject({ code: 'NATIVE_VERSION' })
  expect((error as Error).message).toContain(`${path} has interface version 0.1; this laprox needs 3.5`)
  expect((error as Error).message).toContain('npm run build:native')
})

it('fails alike in whatever needs it, and leaves the rest of the package usable', async () => {
  await load(join(folder, 'nowhere.node'))
  const { Device, policies, Scores, select, Tensor } = await import('../lib/index.js')
  expect(Tensor.zeros('float64', [2 ** 20]).data.length).toBe(2 ** 20)
  const policy = policies.laprox({ keep: 0.5, sinks: 0, recent: 0, pooling: { kind: 'none' } })
  const scores = Scores.from({ layers: 1, kvHeads: 1, lengths: [2], data: Float32Array.of(1, 2) })
  await expect(Device.open()).rejects.toMatchObject({ code: 'NATIVE_MISSING' })
  await expect(select(scores, policy)).rejects.toMatchObject({ code: 'NATIVE_MISSING' })
  // Not for ever: the library may come.
  if (original === undefined) delete process.env.LAPROX_NATIVE_PATH
  else process.env.LAPROX_NATIVE_PATH = original
  expect((await select(scores, policy)).tokens).toEqual(Int32Array.of(1))
})

it('loads the library that was built', async () => {
  delete process.env.LAPROX_NATIVE_PATH
  if (original !== undefined) process.env.LAPROX_NATIVE_PATH = original
  const { native } = await import('../lib/native.js')
  expect(native().version).toMatch(/^\d+\.\d+\.\d+/)
  expect(native()).toBe(native())
})
