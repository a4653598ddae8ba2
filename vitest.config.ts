import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    // On a GPU: vitest.gpu.config.ts. test/cuda.test.ts runs some of them without one.
    exclude: ['test/gpu/**'],
    pool: 'forks',
    testTimeout: 60_000,
    coverage: {
      provider: 'v8',
      include: ['lib/**/*.ts'],
      exclude: ['lib/report/page/**'], // runs in a browser
      reporter: ['text', 'json-summary'],
      thresholds: { lines: 95 },
    },
  },
})
