import { spawn } from 'node:child_process'
import { mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { checkReplaceable, replaceFile } from '../lib/file.js'

let root: string
let folder: string
let path: string

beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), 'laprox-file-'))
})

beforeEach(async () => {
  folder = await mkdtemp(join(root, 'case-'))
  path = join(folder, 'file')
})

afterAll(() => rm(root, { recursive: true }))

async function contents(): Promise<Record<string, string>> {
  const names = await readdir(folder)
  return Object.fromEntries(await Promise.all(names.map(async (name) => [name, await readFile(join(folder, name), 'utf8')])))
}

describe('replaceFile', () => {
  it('writes a new file, and replaces one', async () => {
    await replaceFile(path, (temporary) => writeFile(temporary, 'one'))
    expect(await contents()).toEqual({ file: 'one' })
    await replaceFile(path, async (temporary) => {
      await writeFile(temporary, 'two')
      expect(Object.values(await contents()).sort()).toEqual(['one', 'two'])
    })
    expect(await contents()).toEqual({ file: 'two' })
  })

  it('leaves what was there when it fails, and nothing else', async () => {
    await writeFile(path, 'old')
    const defect = new TypeError('a defect')
    const failing = (error: unknown) =>
      replaceFile(path, async (temporary) => {
        await writeFile(temporary, 'half')
        throw error
      })
    await expect(failing(defect)).rejects.toBe(defect)
    const full = Object.assign(new Error(`ENOSPC: no space left on device, write '${folder}/.tmp'`), { code: 'ENOSPC' })
    await expect(failing(full)).rejects.toMatchObject({
      code: 'IO',
      message: `${path} could not be written: ENOSPC: no space left on device`,
      cause: full,
    })
    expect(await contents()).toEqual({ file: 'old' })
  })

  it('can be aborted until it renames', async () => {
    const controller = new AbortController()
    const writing = replaceFile(path, async (temporary) => writeFile(temporary, 'new').then(() => controller.abort()), { signal: controller.signal })
    await expect(writing).rejects.toMatchObject({ code: 'ABORTED' })
    expect(await contents()).toEqual({})
  })

  it('puts no file in the place of a folder or a device', async () => {
    await mkdir(path)
    await expect(replaceFile(path, (temporary) => writeFile(temporary, 'x'))).rejects.toMatchObject({
      code: 'IO',
      message: expect.stringContaining('it is a folder'),
    })
    await symlink('/dev/null', join(folder, 'device'))
    await expect(replaceFile(join(folder, 'device'), (temporary) => writeFile(temporary, 'x'))).rejects.toMatchObject({
      code: 'IO',
      message: expect.stringContaining('no regular file'),
    })
  })

  it.each(['SIGINT', 'SIGTERM', 'exit'] as const)('takes the half-written file away on %s', async (end) => {
    const program = `
      import { writeFileSync } from 'node:fs'
      import { replaceFile } from ${JSON.stringify(new URL('../dist/file.js', import.meta.url).href)}
      await replaceFile(process.argv[1], async (temporary) => {
        writeFileSync(temporary, 'half')
        if (${JSON.stringify(end)} === 'exit') process.exit(7)
        console.log('half')
        await new Promise((resolve) => setTimeout(resolve, 30_000))
      })`
    const child = spawn(process.execPath, ['--input-type=module', '-e', program, path], { stdio: ['ignore', 'pipe', 'inherit'] })
    if (end !== 'exit') {
      await new Promise((resolve) => child.stdout.once('data', resolve))
      expect(Object.values(await contents())).toEqual(['half'])
      child.kill(end)
    }
    const ended = await new Promise((resolve) => child.once('exit', (code, signal) => resolve(signal ?? code)))
    expect(ended).toBe(end === 'exit' ? 7 : end)
    expect(await contents()).toEqual({})
  })

  it('leaves signals to whoever else handles them', async () => {
    let interrupts = 0
    const handle = (): void => void interrupts++
    process.once('SIGINT', handle)
    await replaceFile(path, async (temporary) => {
      await writeFile(temporary, 'whole')
      process.emit('SIGINT', 'SIGINT')
    })
    expect(interrupts).toBe(1)
    expect(await contents()).toEqual({ file: 'whole' })
    expect(process.listenerCount('SIGINT')).toBe(0)
  })
})

describe('checkReplaceable', () => {
  it('finds out, and leaves nothing', async () => {
    await checkReplaceable(path)
    expect(await contents()).toEqual({})
    await expect(checkReplaceable(join(folder, 'none', 'file'))).rejects.toMatchObject({
      code: 'IO',
      message: `${join(folder, 'none', 'file')} could not be written: ENOENT: no such file or directory`,
    })
    await expect(checkReplaceable(folder)).rejects.toMatchObject({ code: 'IO', message: expect.stringContaining('it is a folder') })
    await writeFile(path, '')
    await expect(checkReplaceable(join(path, 'file'))).rejects.toMatchObject({ code: 'IO', message: expect.stringContaining('ENOTDIR') })
  })
})
