import { type ForkOptions, fork } from 'node:child_process'
import { on, once } from 'node:events'
import { fileURLToPath } from 'node:url'

/**
 * Starts a script of this folder in a process of its own, sends it a job, and gives what it sends back.
 *
 * @throws Error once it has ended, if not well
 */
export async function* inProcess<Message>(script: string, job: object, options: ForkOptions = {}): AsyncGenerator<Message> {
  const child = fork(fileURLToPath(new URL(script, import.meta.url)), { ...options, serialization: 'advanced' })
  const ended = once(child, 'exit')
  const messages = on(child, 'message', { close: ['exit'] })
  child.send(job)
  for await (const [message] of messages) yield message as Message
  const [code] = await ended
  if (code !== 0) throw new Error(`${script} ended with code ${code}`)
}
