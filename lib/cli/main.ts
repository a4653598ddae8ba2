#!/usr/bin/env node
import { run } from './program.js'

const stop = new AbortController()
for (const [signal, exitCode] of [
  ['SIGINT', 130],
  ['SIGTERM', 143],
] as const) {
  // The first asks the work to end, which takes its unfinished files away; another one does not wait for it.
  process.on(signal, () => (stop.signal.aborted ? process.exit(exitCode) : stop.abort(exitCode)))
}
// Whoever reads has had enough, as `head` does after some lines.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error
  process.exit(0)
})
process.exitCode = await run(process.argv.slice(2), { stdout: process.stdout, stderr: process.stderr, signal: stop.signal })
