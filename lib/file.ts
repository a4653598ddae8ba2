import { randomBytes } from 'node:crypto'
import { rmSync } from 'node:fs'
import { open, rename, rm, stat } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { LaproxError, throwIfAborted } from './errors.js'

/**
 * Writes a file whole or not at all: `write` fills a temporary file in the same folder, which is flushed and then renamed. Whatever
 * goes wrong (a full disk, an error of `write`, SIGINT or SIGTERM), `path` holds either what it held before or the whole new file,
 * and the temporary file is gone. A symbolic link is replaced, not what it points at.
 *
 * @param path of the file, which is replaced where it exists
 * @param write is given the name of the temporary file, which is not there yet
 * @throws LaproxError (as a rejection) `IO` with the system's error as `cause`, `ABORTED`; else what `write` rejects with
 */
export async function replaceFile(
  path: string,
  write: (temporary: string) => Promise<void>,
  { signal }: { readonly signal?: AbortSignal | undefined } = {},
): Promise<void> {
  throwIfAborted(signal)
  let temporary: string | undefined
  try {
    await checkTarget(path)
    temporary = temporaryBeside(path)
    watch(temporary)
    await write(temporary)
    throwIfAborted(signal)
    await flush(temporary)
    throwIfAborted(signal)
    await rename(temporary, path)
  } catch (error) {
    throw asLaproxError(error, path)
  } finally {
    // What went wrong first is what the caller hears of. After a rename there is nothing to remove.
    if (temporary !== undefined) {
      await rm(temporary, { force: true }).catch(() => {})
      unwatch(temporary)
    }
  }
}

/**
 * Finds out whether {@link replaceFile} could begin, before the work whose result it is to write: the folder has to be there and to
 * take a new file.
 *
 * @throws LaproxError (as a rejection) `IO`
 */
export async function checkReplaceable(path: string): Promise<void> {
  try {
    await checkTarget(path)
    const probe = temporaryBeside(path)
    watch(probe)
    try {
      await (await open(probe, 'wx')).close()
    } finally {
      await rm(probe, { force: true })
      unwatch(probe)
    }
  } catch (error) {
    throw asLaproxError(error, path)
  }
}

/** Renaming onto a device or a pipe would put a file in its place. */
async function checkTarget(path: string): Promise<void> {
  const stats = await stat(path).catch(() => undefined)
  if (stats === undefined || stats.isFile()) return
  throw new LaproxError('IO', `${path} could not be written: it is ${stats.isDirectory() ? 'a folder' : 'no regular file'}`)
}

/** Short, so that any name which the target may have leaves room for it. */
function temporaryBeside(target: string): string {
  return join(dirname(target), `.laprox-${randomBytes(8).toString('hex')}.tmp`)
}

async function flush(path: string): Promise<void> {
  const handle = await open(path, 'r+')
  try {
    await handle.sync()
  } finally {
    await handle.close()
  }
}

/** Errors of the system have codes such as ENOSPC; Node's own, which are defects, begin with ERR_. */
function asLaproxError(error: unknown, path: string): unknown {
  const code = error instanceof Error && 'code' in error ? String(error.code) : ''
  if (error instanceof LaproxError || !/^E[A-Z0-9]+$/.test(code)) return error
  // Without the name of the temporary file, which means nothing to anybody.
  const reason = (error as Error).message.replace(/, \w+ '.*$/, '')
  return new LaproxError('IO', `${path} could not be written: ${reason}`, { cause: error })
}

const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const
const watched = new Set<string>()

/** Sees to it that a file does not outlive the process. */
function watch(file: string): void {
  if (watched.size === 0) {
    process.on('exit', removeAll)
    // Before the others: those for one signal would be gone by the time that they are counted.
    for (const signal of signals) process.prependListener(signal, end)
  }
  watched.add(file)
}

function unwatch(file: string): void {
  watched.delete(file)
  if (watched.size === 0) unhook()
}

function unhook(): void {
  process.off('exit', removeAll)
  for (const signal of signals) process.off(signal, end)
}

function removeAll(): void {
  for (const file of watched) rmSync(file, { force: true })
}

/** Where nobody else handles the signal it ends the process, as it would have without this listener. */
function end(signal: NodeJS.Signals): void {
  if (process.listenerCount(signal) > 1) return
  removeAll()
  unhook()
  process.kill(process.pid, signal)
}
