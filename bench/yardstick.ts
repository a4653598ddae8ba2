import { execFile } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, extname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import type { MachineRate } from './measurement.js'

// Programs in C and C++ that say what the machine can do. They are compiled when they are needed.

const run = promisify(execFile)
const programs = new Map<string, Promise<string | undefined>>()
let folder: string | undefined

/** A folder that is removed when the process ends. */
export function scratchFolder(): string {
  if (folder === undefined) {
    const created = mkdtempSync(join(tmpdir(), 'laprox-bench-'))
    process.on('exit', () => rmSync(created, { recursive: true, force: true }))
    folder = created
  }
  return folder
}

/** Runs a program of bench/native: the numbers that it prints, or undefined where it cannot be compiled. */
export async function yardstick(source: string, ...args: (number | string)[]): Promise<number[] | undefined> {
  const program = programs.get(source) ?? compile(source)
  programs.set(source, program)
  const path = await program
  if (path === undefined) return undefined
  const { stdout } = await run(path, args.map(String))
  return stdout.trim().split('\n').map(Number)
}

async function compile(source: string): Promise<string | undefined> {
  const path = fileURLToPath(new URL(`native/${source}`, import.meta.url))
  const program = join(scratchFolder(), basename(source, extname(source)))
  const cpp = source.endsWith('.cpp')
  const compiler = cpp ? (process.env.CXX ?? 'c++') : (process.env.CC ?? 'cc')
  const flags = ['-O3', '-ffp-contract=fast', '-pthread', ...(cpp ? ['-std=c++17'] : [])]
  let reason = ''
  for (const cpu of ['-march=native', '-mcpu=native']) {
    try {
      await run(compiler, [...flags, cpu, path, '-o', program])
      return program
    } catch (error) {
      reason ||= (error as Error).message
    }
  }
  console.error(`bench/native/${source} could not be compiled, so that nothing is compared with it: ${reason.trim()}`)
  return undefined
}

/** Operations a second of multiply-adds on registers. */
export async function arithmeticRate(threads: number): Promise<MachineRate | undefined> {
  const rates = await yardstick('multiply_add.c', threads, 15)
  return rates && { value: median(rates), unit: 'operations', of: `multiply-adds on ${count(threads)}` }
}

/** Bytes a second that are read from memory that no cache holds. */
export async function readRate(threads: number): Promise<MachineRate | undefined> {
  const rates = await yardstick('read_memory.c', threads, 5)
  return rates && { value: median(rates), unit: 'bytes', of: `reading memory on ${count(threads)}` }
}

/** Bytes a second that memcpy moves in blocks of `bytes`, into memory in use or into `fresh` memory. */
export async function copyRate(threads: number, bytes: number, fresh: boolean): Promise<MachineRate | undefined> {
  const seconds = await yardstick('copy_memory.c', threads, bytes, 15, Number(fresh))
  return seconds && { value: bytes / median(seconds), unit: 'bytes', of: `memcpy on ${count(threads)}${fresh ? ' into fresh memory' : ''}` }
}

/** The faster of two measurements of the machine, one before and one after what is compared with it. */
export function faster(before: MachineRate | undefined, after: MachineRate | undefined): MachineRate | undefined {
  return before && after && after.value > before.value ? after : before
}

function count(threads: number): string {
  return threads === 1 ? 'one thread' : `${threads} threads`
}

function median(values: readonly number[]): number {
  return Float64Array.from(values).sort()[values.length >> 1]!
}
