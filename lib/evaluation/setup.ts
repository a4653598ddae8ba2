import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { createReadStream, existsSync } from 'node:fs'
import { availableParallelism, cpus } from 'node:os'
import { join } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { fileURLToPath } from 'node:url'
import { env } from 'onnxruntime-node'
import { Device } from '../device.js'
import { LaproxError } from '../errors.js'

/** What figures may depend on, beside the policies. */
export interface Setup {
  /** SHA-256 over the model's files. */
  readonly model: string
  readonly laprox: string
  /** Of laprox's repository, '+' after it where the working tree has changes; absent outside a repository. */
  readonly commit?: string
  readonly onnxruntime: string
  readonly node: string
  readonly cpu: string
  readonly cores: number
  readonly instructionSet: string
  readonly platform: string
}

/** The files of a model's folder that an evaluation reads. */
export const modelFiles: readonly string[] = ['config.json', 'extend.onnx', 'model.safetensors', 'tasks.safetensors']

/** @throws LaproxError (as a rejection) `IO` for files of the model that are missing or cannot be read */
export async function readSetup(folder: string): Promise<Setup> {
  using device = await Device.open('cpu', { threads: 1 })
  const { version, instructionSet } = device.info()
  const commit = readCommit()
  return {
    model: await digest(folder),
    laprox: version,
    ...(commit === undefined ? {} : { commit }),
    onnxruntime: env.versions.node ?? env.versions.common,
    node: process.versions.node,
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    cores: availableParallelism(),
    instructionSet: instructionSet ?? 'unknown',
    platform: `${process.platform}-${process.arch}`,
  }
}

async function digest(folder: string): Promise<string> {
  const missing = modelFiles.filter((file) => !existsSync(join(folder, file)))
  if (missing.length > 0) throw new LaproxError('IO', `${folder} lacks ${missing.join(', ')}; expected a folder with ${modelFiles.join(', ')}`)
  const hash = createHash('sha256')
  for (const file of modelFiles) {
    try {
      await pipeline(createReadStream(join(folder, file)), async (chunks) => {
        for await (const chunk of chunks) hash.update(chunk)
      })
    } catch (error) {
      throw new LaproxError('IO', `${join(folder, file)} could not be read: ${(error as Error).message}`, { cause: error })
    }
  }
  return hash.digest('hex')
}

function readCommit(): string | undefined {
  const root = fileURLToPath(new URL('../..', import.meta.url))
  if (!existsSync(join(root, '.git'))) return undefined
  const git = (...args: string[]): string =>
    execFileSync('git', ['-C', root, ...args], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim()
  try {
    return git('rev-parse', '--short=12', 'HEAD') + (git('status', '--porcelain', '--untracked-files=no') === '' ? '' : '+')
  } catch {
    return undefined
  }
}
