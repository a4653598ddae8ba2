import { accessSync, constants } from 'node:fs'
import { delimiter, join } from 'node:path'
import { type Browser, launch } from 'puppeteer-core'

const names = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable']

/** The system's Chromium: `$CHROMIUM`, or the first of its usual names on PATH. */
export const chromium: string | undefined = [
  process.env.CHROMIUM,
  ...names.flatMap((name) => (process.env.PATH ?? '').split(delimiter).map((folder) => join(folder, name))),
].find((path) => path !== undefined && path !== '' && isExecutable(path))

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK)
    return true
  } catch {
    return false
  }
}

/** Its sandbox wants a user that is not root, and it cannot be with the sanitizers that a test's process is preloaded with. */
export function launchChromium(): Promise<Browser> {
  const args = process.getuid?.() === 0 ? ['--no-sandbox'] : []
  return launch({ executablePath: chromium!, headless: true, args, env: { ...process.env, LD_PRELOAD: '' } })
}
