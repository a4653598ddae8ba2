import { readFileSync } from 'node:fs'

/** The version of the package, whether or not its native library can be loaded. */
export const packageVersion: string = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')).version
