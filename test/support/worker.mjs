// A worker thread, told what to do by workerData: see lifecycle.test.ts.
import { parentPort, workerData } from 'node:worker_threads'
import { evict, score } from '../../dist/index.js'
import { load } from './load.mjs'

const { task } = workerData
const { device, model, cache, window, policy } = await load(task === 'use' ? 1000 : 100_000)

if (task === 'use') {
  const { report } = await evict(model, cache, window, policy)
  device.dispose()
  parentPort.postMessage(report.kept)
} else {
  // Never ends: one call runs, others wait.
  const calls = Array.from({ length: 20 }, () => score(model, cache, window, policy))
  parentPort.postMessage('busy')
  if (task === 'exit') setTimeout(() => process.exit(3), 100)
  await Promise.all(calls)
}
