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
    const [, runner, file] = /(tsx|node) (\S+)$/.exec(script) ?? []
    if (file === undefined) return rest.length === 0 ? undefined : `npm run ${name} takes no options`
    return untaken(`npm run ${name}`, rest, runner === 'tsx' ? helpOf(file) : textOf(file))
  },
  npx: ([, ...words]) => (words[0] === 'laprox' ? commands.laprox!(words) : `npx ${words[0]}: unknown`),
  laprox([, command = '', ...rest]) {
    const main = 'lib/cli/main.ts'
    if (!existsSync(join(root, main))) return there(main)
    if (command.startsWith('-')) return untaken('laprox', [command, ...rest], helpOf(main))
    if (!new RegExp(`^ +${command}\\b`, 'm').test(helpOf(main))) return `laprox has no command ${command}`
    return untaken(`laprox ${command}`, rest, helpOf(main, command))
  },
  node: ([, file]) => there(file),
  python: ([, file, ...rest]) => there(file) ?? untaken(file!, rest, textOf(file!)),
  pip: () => undefined,
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

/** What is wrong with the options among the words of a command, given a text that has those it takes. */
function untaken(command: string, words: Words, text: string): string | undefined {
  const given = words.filter((word) => /^--?\w/.test(word)).map((word) => word.split('=')[0]!)
  // As they stand in a help or are asked for in a script, or as parseArgs is told of them.
  const missing = given.filter((option) => !new RegExp(`(?<![\\w-])${option}(?![\\w-])|\\b${option.replace(/^-+/, '')}: \\{ type:`).test(text))
  return missing.length === 0 ? undefined : `${command} does not take ${missing.join(', ')}`
}

function textOf(file: string): string {
  return readFileSync(join(root, file), 'utf8')
}

const helps = new Map<string, string>()

/** What a program of this repository prints when it is asked for help. */
function helpOf(file: string, ...command: Words): string {
  const key = [file, ...command].join(' ')
  let help = helps.get(key)
  if (help === undefined) {
    const args = ['--import', 'tsx', file, ...command, '--help']
    const { status, stdout, stderr } = spawnSync(process.execPath, args, { cwd: root, encoding: 'utf8', env: { ...process.env, LD_PRELOAD: '' } })
    if (status !== 0) throw new Error(`${key} --help: ${stderr}`)
    help = stdout
    helps.set(key, help)
  }
  return help
}
