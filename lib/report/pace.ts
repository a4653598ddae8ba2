import { setImmediate } from 'node:timers/promises'

/** Work on the JavaScript thread that is to be interrupted goes on for this many milliseconds at a time. */
const slice = 10

/** Lets the event loop turn when the work has gone on for long enough: to be awaited now and then. */
export function pacer(): () => Promise<void> {
  let begun = performance.now()
  return async () => {
    if (performance.now() - begun < slice) return
    await setImmediate()
    begun = performance.now()
  }
}
