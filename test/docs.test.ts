// Everything that README and the guides show is run, checked or refused: a block of a language that is not here fails.
import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { policy, presetNames, validatePolicy } from '../lib/index.js'
import { complaints } from './docs/commands.js'
import { type Block, filesOf, follow, isThere, type Page, readPages, root } from './docs/markdown.js'
import {
  clean,
  isExcerpt,
  isForGpu,
  type Program,
  programsOf,
  runC,
  runJavaScript,
  runTypeScript,
  typeCheck,
  writeTypeScript,
} from './docs/programs.js'
import { coreLibrary } from './support/cuda/build.js'

const pages = readPages()
// Made of comments: their examples are the guides'.
const written = pages.filter(({ path }) => !path.startsWith('docs/api/'))
const at = ({ path }: Page, { line }: { readonly line: number }): string => `${path}:${line}`
const nameOf = ({ page, blocks, setup }: Program): string => `${at(page, blocks[0]!)}${setup === undefined ? '' : `, after ${setup}`}`

afterAll(clean)

/** What is wrong with a block that is no program. */
const checks: Readonly<Record<string, (block: Block) => string[] | Promise<string[]>>> = {
  '': ({ text }) => complaints(text),
  sh: ({ text }) => complaints(text),
  json({ text, marks }) {
    try {
      const value: unknown = JSON.parse(text)
      if (marks.get('json') === 'policy') validatePolicy(value)
      return []
    } catch (error) {
      return [(error as Error).message]
    }
  },
  python: ({ text }) => {
    // Is it Python? What it needs to run is not here.
    const { status, stderr, error } = spawnSync('python3', ['-c', 'import ast, sys; ast.parse(sys.stdin.read())'], { input: text, encoding: 'utf8' })
    return error !== undefined || status === 0 ? [] : [stderr.trim().split('\n').at(-1)!]
  },
  // Output, formulas, trees of files: nothing that runs.
  text: () => [],
  math: () => [],
}
const programLanguages = ['ts', 'js', 'cjs', 'c']

describe('blocks of code', () => {
  it('are of languages that are run or checked', () => {
    const isKnown = ({ language, marks }: Block): boolean => programLanguages.includes(language) || language in checks || marks.has('from')
    const unknown = written.flatMap((page) => page.blocks.filter((block) => !isKnown(block)).map((block) => at(page, block)))
    expect(unknown).toEqual([])
  })

  it('that are commands, data or excerpts are as they should be', async () => {
    const checked = written.flatMap((page) =>
      page.blocks.map(async (block) => {
        const source = block.marks.get('from')
        if (source !== undefined) return isExcerpt(block.text, source) ? [] : [`${at(page, block)} is no part of ${source}`]
        const wrong = (await checks[block.language]?.(block)) ?? []
        return wrong.map((what) => `${at(page, block)}: ${what}`)
      }),
    )
    expect((await Promise.all(checked)).flat()).toEqual([])
  })

  it('refuse what they should', async () => {
    expect(await complaints('npm run nothing')).toEqual(['package.json has no script nothing'])
    expect(await complaints('A=1 npm run build:native -- --nothing --werror # --comment')).toEqual(['npm run build:native does not take --nothing'])
    expect(await complaints('npm run demo -- --promtps 3 \\\n  --keep 5%')).toEqual(['npm run demo does not take --promtps'])
    expect(await complaints('cd here && rm -rf there')).toEqual(['rm: no command that test/docs/commands.ts knows'])
  })
})

describe('commands in a sentence', () => {
  it('are there, and take the options', async () => {
    const spans = written.flatMap((page) =>
      page.spans.filter(({ text }) => /^(npm run|node|npx|laprox) \S/.test(text)).map((span) => ({ page, span })),
    )
    const wrong = await Promise.all(spans.map(async ({ page, span }) => (await complaints(span.text)).map((what) => `${at(page, span)}: ${what}`)))
    expect(wrong.flat()).toEqual([])
  })
})

const typescript = written.flatMap((page) => programsOf(page, 'ts'))
const files = new Map(typescript.map((program) => [program, writeTypeScript(program)]))
const javascript = written.flatMap((page) => [...programsOf(page, 'js'), ...programsOf(page, 'cjs')])
const c = written.flatMap((page) => programsOf(page, 'c'))
const library = coreLibrary()

/** Those that run on a CPU: the others are in test/gpu/docs.test.ts. */
const named = (programs: readonly Program[]) => programs.filter((program) => !isForGpu(program)).map((program) => [nameOf(program), program] as const)

describe('programs', () => {
  it('in TypeScript pass the compiler, those for a GPU too', () => {
    expect(files.size).toBeGreaterThan(0)
    expect(typeCheck(files)).toBe('')
  })

  it.each(named(typescript))('%s runs', async (_, program) => {
    await runTypeScript(files.get(program)!)
  })

  it.each(named(javascript))('%s runs', (_, program) => {
    expect(runJavaScript(program)).toBe('')
  })

  it.skipIf(library === undefined).each(named(c))('%s compiles and runs', (_, program) => {
    expect(runC(program, library!)).toBe('')
  })
})

describe('guides', () => {
  const text = (path: string): string => readFileSync(join(root, path), 'utf8')

  it('tell the pooling and the scope of every preset', () => {
    const rows = text('docs/policies.md').split('\n')
    for (const name of presetNames) {
      const { pooling, scope } = policy(name, { keep: 0.1 })
      const cells = rows.find((row) => row.startsWith(`| \`${name}\` |`))?.split(' | ')
      const told = { pooling: cells?.[2], scope: /^(?:over|in) (?:the|a) (\w+)/.exec(cells?.[3] ?? '')?.[1] }
      expect({ name, ...told }).toEqual({ name, pooling: pooling.kind === 'none' ? 'none' : `${pooling.kind} ${pooling.width}`, scope })
    }
  })

  it('say what to do about every error', () => {
    const [, union] = /LaproxErrorCode =\n([\s\S]*?)\n\n/.exec(text('lib/errors.ts'))!
    const codes = Array.from(union!.matchAll(/'(\w+)'/g), ([, code]) => code!)
    expect(codes).toContain('ABORTED')
    expect(codes.filter((code) => !text('docs/embedding.md').includes(`\`${code}\``))).toEqual([])
  })
})

describe('links', () => {
  it('lead to files, folders and headings that are there', () => {
    const broken: string[] = []
    for (const page of pages) {
      for (const { text, line } of page.links) {
        const to = follow(page, text)
        if (to === undefined) continue
        const target = pages.find(({ path }) => path === to.path)
        if (!isThere(to.path)) broken.push(`${at(page, { line })}: ${text}`)
        else if (to.anchor !== undefined && target !== undefined && !target.anchors.has(to.anchor)) broken.push(`${at(page, { line })}: ${text}`)
      }
    }
    expect(broken).toEqual([])
  })

  it('lead to every file of docs', () => {
    const linked = new Set(pages.flatMap((page) => page.links.map(({ text }) => follow(page, text)?.path)))
    expect(filesOf('docs').filter((path) => !linked.has(path))).toEqual([])
  })
})
