import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { vi } from 'vitest'
import { type Block, type Page, root } from './markdown.js'

/**
 * Blocks of a page that are run as one program: from one `<!-- setup: NAME -->` to the next. Each sees the names of those before
 * it, and may take them anew; the first sees what test/docs/setups/NAME exports.
 */
export interface Program {
  readonly page: Page
  readonly setup: string | undefined
  readonly blocks: readonly Block[]
}

/** The programs of a page that are written in one of the languages. */
export function programsOf(page: Page, ...languages: readonly string[]): Program[] {
  const programs: { page: Page; setup: string | undefined; blocks: Block[] }[] = []
  for (const block of page.blocks) {
    if (!languages.includes(block.language) || block.marks.has('from')) continue
    const setup = block.marks.get('setup')
    if (setup !== undefined || programs.length === 0) programs.push({ page, setup, blocks: [] })
    programs.at(-1)!.blocks.push(block)
  }
  return programs
}

/** Programs of setups that are named so are for a GPU. */
export function isForGpu({ setup }: Program): boolean {
  return setup?.startsWith('gpu') === true
}

/** Where programs are written to: two test files may do it at a time. */
const folder = join(root, '.docs', String(process.pid))
const setups = join(root, 'test', 'docs', 'setups')
/** Without the sanitizers that scripts/sanitize.mjs preloads into this process. */
const plain: NodeJS.ProcessEnv = { ...process.env, LD_PRELOAD: '' }

function fileName({ page, blocks }: Program, extension: string): string {
  return join(folder, `${page.path.replaceAll('/', '-').replace(/\.md$/, '')}-${blocks[0]!.line}.${extension}`)
}

/**
 * Writes a program's TypeScript, each line on the line that it has in the page, and gives its path. Its default export runs it;
 * where a line says `expression // => value`, it checks that.
 */
export function writeTypeScript(program: Program): string {
  const lines: string[] = []
  const imports = new Map<string, Set<string>>()
  for (const { text, line } of program.blocks) {
    const body = text.replace(/^import (?:(type) )?\{([^}]*)\} from '([^']+)'$/gm, (all, type: string | undefined, names: string, from: string) => {
      const known = imports.get(from) ?? new Set()
      for (const name of names.split(',')) if (name.trim() !== '') known.add(`${type === undefined ? '' : 'type '}${name.trim()}`)
      imports.set(from, known)
      return all.replace(/[^\n]/g, '')
    })
    lines[line - 2] = '{'
    for (const [i, code] of body.trimEnd().split('\n').entries()) lines[line - 1 + i] = code.replace(/^(\s*)(\S.*) \/\/ => (.*)$/, '$1same($2, $3)')
  }
  const head = Array.from(imports, ([from, known]) => `import { ${[...known].join(', ')} } from '${from.replace(/^laprox(?:\/(.*))?$/, sourceOf)}'; `)
  head.push("import { same } from '../../test/docs/same.js'; ")
  if (program.setup !== undefined) {
    const names = exportsOf(program.setup)
    head.push(`import ${names.length > 0 ? `{ ${names.join(', ')} } from ` : ''}'../../test/docs/setups/${program.setup}.js'; `)
  }
  lines[0] = `${head.join('')}export default async function run(): Promise<void> {`
  lines.push(`${'}'.repeat(program.blocks.length + 1)}`)
  const file = fileName(program, 'ts')
  mkdirSync(folder, { recursive: true })
  writeFileSync(file, `${Array.from(lines, (line) => line ?? '').join('\n')}\n`)
  return file
}

/** `laprox` and `laprox/name` are index.ts and name.ts. */
function sourceOf(_all: string, name: string | undefined): string {
  return `../../lib/${name ?? 'index'}.js`
}

function exportsOf(setup: string): string[] {
  const text = readFileSync(join(setups, `${setup}.ts`), 'utf8')
  const own = Array.from(text.matchAll(/^export (?:const|let|function|async function) (\w+)/gm), ([, name]) => name!)
  const others = Array.from(text.matchAll(/^export \* from '\.\/(.*)\.js'$/gm), ([, name]) => exportsOf(name!))
  const named = Array.from(text.matchAll(/^export \{(.*)\} from/gm), ([, names]) => names!.split(',').map((name) => name.trim()))
  return [...own, ...others.flat(), ...named.flat()]
}

/** Type-checks everything that is written, at once; gives the compiler's complaints, in terms of the pages. */
export function typeCheck(files: ReadonlyMap<Program, string>): string {
  const project = join(folder, 'tsconfig.json')
  const compilerOptions = { noUnusedLocals: false, noUnusedParameters: false, allowUnreachableCode: true }
  writeFileSync(project, JSON.stringify({ extends: '../../tsconfig.json', compilerOptions, include: [], files: [...files.values()] }))
  const { stdout, stderr } = spawnSync(process.execPath, [join(root, 'node_modules/typescript/bin/tsc'), '-p', project], {
    encoding: 'utf8',
    env: plain,
  })
  const inPages = [...files].reduce((text, [program, file]) => text.replaceAll(relative(root, file), program.page.path), stdout)
  return inPages + stderr
}

/** Runs a program that is written, in an empty folder. */
export async function runTypeScript(file: string): Promise<void> {
  const log = vi.spyOn(console, 'log').mockImplementation(() => {})
  const before = process.cwd()
  const empty = mkdtempSync(join(tmpdir(), 'laprox-docs-'))
  process.chdir(empty)
  // What a setup exports may be changed by what follows it.
  vi.resetModules()
  try {
    const { default: run } = (await import(file)) as { default: () => Promise<void> }
    await run()
  } finally {
    process.chdir(before)
    rmSync(empty, { recursive: true })
    log.mockRestore()
  }
}

/** Compiles a program's C, with the lines of the page, and runs it where it is for a CPU. Gives what it says, which is nothing. */
export function runC(program: Program, library: string, environment: NodeJS.ProcessEnv = {}): string {
  const whole = program.setup === undefined
  const parts = program.blocks.map(({ text, line }) => `${whole ? '' : '{'}\n#line ${line} "${program.page.path}"\n${text}`)
  if (!whole) parts.unshift(readFileSync(join(setups, `${program.setup}.c`), 'utf8'))
  if (!whole) parts.push('}'.repeat(program.blocks.length), '\nreturn 0;\n}\n')
  const source = fileName(program, 'c')
  const binary = fileName(program, 'out')
  mkdirSync(folder, { recursive: true })
  writeFileSync(source, parts.join(''))
  const warnings = [
    '-Wall',
    '-Wextra',
    '-pedantic',
    '-Werror',
    '-Wno-unused-variable',
    '-Wno-unused-function',
    '-Wno-unused-but-set-variable',
    '-Wno-shadow',
  ]
  const sanitizers = library.includes('.cmake-sanitize') ? ['-fsanitize=address,undefined'] : []
  const compiled = spawnSync(
    'cc',
    [
      ...['-std=c11', ...warnings, ...sanitizers, `-I${join(root, 'native/include')}`, source, library],
      ...['-lstdc++', '-lm', '-pthread', '-ldl', '-o', binary],
    ],
    { encoding: 'utf8', env: plain },
  )
  if (compiled.status !== 0) return compiled.error?.message ?? compiled.stderr
  const { status, signal, stderr, error } = spawnSync(binary, [], { encoding: 'utf8', env: { ...plain, ...environment } })
  return status === 0 ? '' : (error?.message ?? `${stderr}\nended with ${status ?? signal}`)
}

/** Runs a JavaScript block as a file of its own, which loads the built package as any program does. */
export function runJavaScript(program: Program): string {
  const file = fileName(program, program.blocks[0]!.language === 'cjs' ? 'cjs' : 'mjs')
  mkdirSync(folder, { recursive: true })
  writeFileSync(file, program.blocks.map(({ text }) => text).join('\n'))
  const { status, stderr } = spawnSync(process.execPath, [file], { encoding: 'utf8', cwd: root })
  return status === 0 ? '' : stderr
}

/** Whether an excerpt stands in the file that it is from: its lines, one after the other, more or less indented. */
export function isExcerpt(text: string, path: string): boolean {
  const strip = (source: string): string =>
    source
      .split('\n')
      .map((line) => line.trim())
      .join('\n')
  return existsSync(join(root, path)) && strip(readFileSync(join(root, path), 'utf8')).includes(strip(text).trim())
}

/** Removes what was written. */
export function clean(): void {
  rmSync(folder, { recursive: true, force: true })
}
