import { readFileSync, writeFileSync } from 'node:fs'
import { setTimeout } from 'node:timers/promises'

/** Environment that makes the C library of Linux give memory back as soon as it is freed, so that what is taken next can be seen. */
export const tellingMemory = { MALLOC_MMAP_THRESHOLD_: '65536', MALLOC_TRIM_THRESHOLD_: '65536' } as const

/** The resident memory of this process, in MiB: when `task` begins, once garbage is gone, and at most while it runs. */
export async function residentMemory(task: () => Promise<unknown>): Promise<{ before: number; peak: number }> {
  for (let i = 0; i < 3; i++) {
    global.gc?.()
    await setTimeout(50)
  }
  try {
    writeFileSync('/proc/self/clear_refs', '5') // forgets the peak so far
  } catch {
    // Not Linux: the peak since the process began stands for it.
  }
  const before = process.memoryUsage.rss() / 2 ** 20
  await task()
  return { before, peak: peakSoFar() }
}

function peakSoFar(): number {
  try {
    const [, kilobytes] = /^VmHWM:\s+(\d+) kB$/m.exec(readFileSync('/proc/self/status', 'utf8'))!
    return Number(kilobytes) / 1024
  } catch {
    return process.resourceUsage().maxRSS / 1024
  }
}
