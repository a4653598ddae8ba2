import { execFile } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { root } from './markdown.js'

/** The words of a command. */
type Words = readonly string[]
/** What is wrong; undefined where nothing is. */
type Complaint = string | undefined | Promise<string | undefined>

const { scripts } = JSON.parse(textOf('package.json')) as { scripts: Readonly<Record<string, string>> }

/** Whatever a page may tell its reader to type, by its first word. */
const commands: Readonly<Record<string, (words: Words) => Complaint>> = {
  npm([, verb = '', name = '', ...rest]) {
    if (verb === 'test') return name === '' || name === '--' ? rest.map(there).find((wrong) => wrong !== undefined) : `npm test ${name}: expected --`
    if (verb !== 'run') return ['ci', 'install', 'version', 'pack', 'publish'].includes(verb) ? undefined : `npm ${verb}: unknown`
    const script = scripts[name]
    if (script === undefined) return `package.json has no script ${name}`
    const [, runner, file] = /(tsx|node) (\S+)$/.exec(script) ?? []
    if (file === undefined) return rest.length === 0 ? undefined : `npm run ${name} takes no options`
    return untaken(`npm run ${name}`, rest, runner === 'tsx' ? helpOf(file) : textOf(file))
  },
  npx: ([, ...words]) => (words[0] === 'laprox' ? commands.laprox!(words) : `npx ${words[0]}: unknown`),
  async laprox([, command = '', ...rest]) {
    const main = 'lib/cli/main.ts'
    if (there(main) !== undefined) return there(main)
    if (command.startsWith('-')) return untaken('laprox', [command, ...rest], helpOf(main))
    if (!new RegExp(`^ +${command}\\b`, 'm').test(await helpOf(main))) return `laprox has no command ${command}`
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
export async function complaints(text: string): Promise<string[]> {
  const lines = text.replaceAll(/\\\n\s*/g, '').split('\n')
  const found = await Promise.all(lines.flatMap(commandsOf).map(complaint))
  return found.filter((wrong) => wrong !== undefined)
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

async function complaint(words: Words): Promise<string | undefined> {
  const check = Object.hasOwn(commands, words[0]!) ? commands[words[0]!] : undefined
  return check === undefined ? `${words[0]}: no command that test/docs/commands.ts knows` : check(words)
}

function there(file: string | undefined): string | undefined {
  return file !== undefined && existsSync(join(root, file)) ? undefined : `${file} is not there`
}

/** What is wrong with the options among the words of a command, given a text that has those it takes. */
async function untaken(command: string, words: Words, text: string | Promise<string>): Promise<string | undefined> {
  const given = words.filter((word) => /^--?\w/.test(word)).map((word) => word.split('=')[0]!)
  if (given.length === 0) return undefined
  const taken = await text
  // As they stand in a help or are asked for in a script, or as parseArgs is told of them.
  const missing = given.filter((option) => !new RegExp(`(?<![\\w-])${option}(?![\\w-])|\\b${option.replace(/^-+/, '')}: \\{ type:`).test(taken))
  return missing.length === 0 ? undefined : `${command} does not take ${missing.join(', ')}`
}

function textOf(file: string): string {
  return readFileSync(join(root, file), 'utf8')
}

const helps = new Map<string, Promise<string>>()

/** What a program of this repository prints when it is asked for help. */
function helpOf(file: string, ...command: Words): Promise<string> {
  const args = [file, ...command, '--help']
  const key = args.join(' ')
  let help = helps.get(key)
  if (help === undefined) {
    const options = { cwd: root, env: { ...process.env, LD_PRELOAD: '' } }
    help = promisify(execFile)(process.execPath, ['--import', 'tsx', ...args], options).then(({ stdout }) => stdout)
    helps.set(key, help)
  }
  return help
}
