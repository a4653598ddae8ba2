import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { root } from './markdown.js'

/** The words of a command. */
type Words = readonly string[]

const { scripts } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { scripts: Readonly<Record<string, string>> }

/** What is wrong with a command, or undefined. By its first word; whatever a page may tell its reader to type is here. */
const commands: Readonly<Record<string, (words: Words) => string | undefined>> = {
  npm([, verb, name, ...rest]) {
    if (verb === 'test') return name === undefined || name === '--' ? files(rest) : `npm test ${name}: expected --`
    if (verb !== 'run') return ['ci', 'install', 'version', 'pack', 'publish'].includes(verb ?? '') ? undefined : `npm ${verb}: unknown`
    const script = scripts[name ?? '']
    if (script === undefined) return `package.json has no script ${name}`
    const given = rest.filter((word) => word.startsWith('--') && word !== '--').map((word) => word.split('=')[0]!)
    const missing = given.filter((option) => !knows(script, option))
    return missing.length === 0 ? undefined : `npm run ${name} does not take ${missing.join(', ')}`
  },
  node: ([, file]) => there(file),
  '.ci/run': ([file]) => there(file),
  git: ([, verb]) => (verb === 'clone' ? undefined : `git ${verb}: unknown`),
  cd: () => undefined,
  // examples/c/main.c says the same, and scripts/check-c.mjs does it.
  cmake: (words) => (words.includes('-S') ? there(words[words.indexOf('-S') + 1]) : undefined),
  'example/evict': () => undefined,
}

/** What is wrong with a text that is to be typed into a shell, line by line. */
export function complaints(text: string): string[] {
  const lines = text.replaceAll(/\\\n\s*/g, '').split('\n')
  return lines.flatMap((line) => commandsOf(line).flatMap((words) => complaint(words) ?? []))
}

/** The commands of a line, without comments and settings of the environment. */
function commandsOf(line: string): string[][] {
  const words = Array.from(line.matchAll(/'[^']*'|"[^"]*"|[^\s'"]+/g), ([word]) => word)
  const comment = words.findIndex((word) => word.startsWith('#'))
  const all: string[][] = [[]]
  for (const word of comment < 0 ? words : words.slice(0, comment)) {
    if (word === '&&' || word === '|') all.push([])
    else if (all.at(-1)!.length > 0 || !/^\w+=/.test(word)) all.at(-1)!.push(word)
  }
  return all.filter((command) => command.length > 0)
}

function complaint(words: Words): string | undefined {
  const check = Object.hasOwn(commands, words[0]!) ? commands[words[0]!] : undefined
  return check === undefined ? `${words[0]}: no command that test/docs/commands.ts knows` : check(words)
}

function there(file: string | undefined): string | undefined {
  return file !== undefined && existsSync(join(root, file)) ? undefined : `${file} is not there`
}

function files(paths: Words): string | undefined {
  return paths.map(there).find((wrong) => wrong !== undefined)
}

const helps = new Map<string, string>()

/** Whether a script's program says that it takes an option: in its help, or, where it has none, in its text. */
function knows(script: string, option: string): boolean {
  const [, runner, file] = /(tsx|node) (\S+)$/.exec(script) ?? []
  if (runner === undefined) return false
  if (runner === 'node') return new RegExp(`${option}\\b|\\b${option.slice(2)}: \\{`).test(readFileSync(join(root, file!), 'utf8'))
  let help = helps.get(file!)
  if (help === undefined) {
    help = spawnSync(process.execPath, ['--import', 'tsx', file!, '--help'], {
      cwd: root,
      encoding: 'utf8',
      env: { ...process.env, LD_PRELOAD: '' },
    }).stdout
    helps.set(file!, help)
  }
  return new RegExp(`${option}(?![\\w-])`).test(help)
}
