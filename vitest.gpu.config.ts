import { defineConfig } from 'vitest/config'

const cost = 'test/gpu/cost.test.ts'

export default defineConfig({
  test: {
    pool: 'forks',
    testTimeout: 120_000,
    projects: [
      { extends: true, test: { name: 'gpu', include: ['test/gpu/**/*.test.ts'], exclude: [cost], sequence: { groupOrder: 0 } } },
      // What takes its time wants the machine for itself.
      { extends: true, test: { name: 'cost', include: [cost], sequence: { groupOrder: 1 } } },
    ],
  },
})
