import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { describe, expect, it } from 'vitest'

// The library is the one that cmake-js built beside the addon; .ci/run also builds it by plain CMake, and for arm64.
const built = existsSync(new URL('../.cmake/CMakeCache.txt', import.meta.url))

describe.skipIf(!built)('the C ABI', () => {
  it('is found, linked and used by a C program after cmake --install', () => {
    const script = new URL('../scripts/check-c.mjs', import.meta.url).pathname
    const { status, stdout, stderr } = spawnSync(process.execPath, [script, 'addon'], { encoding: 'utf8', env: { ...process.env, LD_PRELOAD: '' } })
    expect(stderr).toBe('')
    expect(status).toBe(0)
    expect(stdout).toContain('kept 96 of 384 entries (48 of them protected)')
  })
})
