import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import type { Line } from './results.js'

const root = fileURLToPath(new URL('../..', import.meta.url))
const build = join(root, '.cmake')
const core = join(build, 'liblaprox.a')
const sources = ['gpu.cu', 'gpu_data.cuh', 'gpu_rates.cuh', 'gpu_reference.cuh', 'gpu_timing.cuh'].map((name) => join(root, 'bench/native', name))

/** Why nothing can be measured here, or undefined. */
export function reasonToSkip(): string | undefined {
  const { status, stdout } = spawnSync('nvidia-smi', ['-L'], { encoding: 'utf8' })
  if (status !== 0 || !stdout.includes('GPU')) return 'this machine has no NVIDIA GPU'
  if (!existsSync(cudaLibrary())) return `there is no ${cudaLibrary()}: build laprox where nvcc is`
  return undefined
}

function cudaLibrary(): string {
  return process.env.LAPROX_CUDA_PATH || join(build, 'Release', 'liblaprox_cuda.so')
}

/**
 * The native program, compiled where it is not there yet: its name tells what it was made of, so that one made elsewhere serves.
 *
 * @throws Error where it must be compiled and cannot be
 */
export function nativeProgram(): string {
  if (!existsSync(core)) throw new Error(`there is no ${core}: npm run build`)
  const hash = createHash('sha256')
  for (const file of [...sources, join(root, 'native/include/laprox/laprox.h'), core]) hash.update(readFileSync(file))
  const program = join(build, `bench-gpu-${hash.digest('hex').slice(0, 12)}`)
  if (existsSync(program)) return program
  mkdirSync(build, { recursive: true })
  const nvcc = [process.env.NVCC, 'nvcc', '/usr/local/cuda/bin/nvcc'].find((name) => name && spawnSync(name, ['--version']).status === 0)
  if (nvcc === undefined) throw new Error('nvcc is not installed, and the native program of the benchmark has to be compiled')
  const flags = ['-std=c++20', '-O3', '--extended-lambda', '-cudart', 'static', '-Xcompiler', '-static-libstdc++,-static-libgcc']
  const targets = ['-gencode', 'arch=compute_90a,code=sm_90a', '-gencode', 'arch=compute_80,code=compute_80']
  const args = [...flags, ...targets, '-I', join(root, 'native/include'), sources[0]!, core, '-lpthread', '-ldl', '-o', program]
  const { status, stderr } = spawnSync(nvcc, args, { encoding: 'utf8', maxBuffer: 1 << 26 })
  if (status !== 0) throw new Error(`bench/native/gpu.cu could not be compiled:\n${stderr}`)
  return program
}

/** Runs the native program. Its lines come as they are printed. */
export function measure(args: readonly string[]): AsyncGenerator<Line> {
  return linesOf(nativeProgram(), args, { LAPROX_CUDA_PATH: cudaLibrary() })
}

/** The same formulas in PyTorch; one line of kind 'note' where Python has none. */
export async function* measurePeers(args: readonly string[]): AsyncGenerator<Line> {
  const python = process.env.PYTHON || 'python3'
  if (spawnSync(python, ['-c', 'import torch']).status !== 0) {
    yield { kind: 'note', text: 'no Python with PyTorch was there: nothing is compared with it' }
    return
  }
  yield* linesOf(python, [join(root, 'bench/peers/torch_peers.py'), ...args], {})
}

async function* linesOf(command: string, args: readonly string[], env: Record<string, string>): AsyncGenerator<Line> {
  const child = spawn(command, args, { env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'inherit'] })
  const ended = new Promise<string>((resolve) => {
    child.on('error', (error) => resolve(error.message))
    child.on('close', (code, signal) => resolve(code === 0 ? '' : `ended with ${signal ?? code}`))
  })
  for await (const line of createInterface({ input: child.stdout })) {
    if (line.startsWith('{')) yield JSON.parse(line) as Line
  }
  const failure = await ended
  if (failure !== '') yield { kind: 'note', text: `${command} ${args.join(' ')}: ${failure}` }
}
