import { Progress, type ProgressStream } from './progress.js'

/** Where a command writes to, and what stops it. */
export interface Terminal {
  /** Results. */
  readonly stdout: { write(text: string): unknown }
  /** Errors; where it is a terminal, progress too. */
  readonly stderr: ProgressStream
  /** Aborted when the user stops the command, with the exit code as its reason. */
  readonly signal: AbortSignal
}

/** Does some work that can be stopped, with a progress bar where there is a terminal. */
export async function watch<T>(
  terminal: Terminal,
  what: string,
  work: (hooks: { readonly signal: AbortSignal; readonly progress: (done: number) => void }) => Promise<T>,
): Promise<T> {
  const bar = new Progress(1, terminal.stderr)
  try {
    return await work({ signal: terminal.signal, progress: (done) => bar.update(done, what) })
  } finally {
    bar.clear()
  }
}

/** Prints one JSON document. */
export function printJson(terminal: Terminal, value: unknown): void {
  terminal.stdout.write(`${JSON.stringify(value, undefined, 2)}\n`)
}
