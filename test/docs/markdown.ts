import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import markdownIt, { type Token } from 'markdown-it'

export const root: string = fileURLToPath(new URL('../..', import.meta.url))

/** A block of code: between fences, or indented. */
export interface Block {
  /** What stands behind the fence; empty where nothing does. */
  readonly language: string
  readonly text: string
  /** The line of the page, from 1, on which its text begins. */
  readonly line: number
  /** HTML comments right before it, `<!-- key: value -->`. */
  readonly marks: ReadonlyMap<string, string>
}

/** A Markdown file of the repository. */
export interface Page {
  /** From the root. */
  readonly path: string
  readonly blocks: readonly Block[]
  /** Targets of links and images, as they are written. */
  readonly links: readonly At[]
  /** What can stand behind a # in a link to it. */
  readonly anchors: ReadonlySet<string>
  /** `code` between backticks. */
  readonly spans: readonly At[]
}

/** Some text of a page. */
export interface At {
  readonly text: string
  readonly line: number
}

/** The files of a folder and those below it, from the root. */
export function filesOf(folder: string): string[] {
  return readdirSync(join(root, folder), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map(({ parentPath, name }) => relative(root, join(parentPath, name)).replaceAll('\\', '/'))
    .sort()
}

/** All Markdown files of the repository. */
export function readPages(): Page[] {
  const nested = ['docs', 'examples', 'bench'].flatMap(filesOf)
  return [...readdirSync(root), ...nested].filter((path) => path.endsWith('.md')).map(readPage)
}

const parser = markdownIt({ html: true })

export function readPage(path: string): Page {
  const tokens = parser.parse(readFileSync(join(root, path), 'utf8'), {})
  const blocks: Block[] = []
  const links: At[] = []
  const anchors = new Set<string>()
  const spans: At[] = []
  let marks = new Map<string, string>()
  let line = 1
  const addHtml = (html: string): void => {
    for (const [, text] of html.matchAll(/\s(?:href|src|srcset)="([^"]+)"/g)) links.push({ text: text!, line })
    for (const [, id] of html.matchAll(/\sid="([^"]+)"/g)) anchors.add(id!)
    for (const [, key, value] of html.matchAll(/<!--\s*(\w+):\s*(.*?)\s*-->/g)) marks.set(key!, value!)
  }
  for (const [i, token] of tokens.entries()) {
    if (token.map !== null) line = token.map[0] + 1
    if (token.type === 'html_block') {
      addHtml(token.content)
      continue
    }
    if (token.type === 'fence') blocks.push({ language: token.info.trim(), text: token.content, line: line + 1, marks })
    if (token.type === 'code_block') blocks.push({ language: '', text: token.content, line, marks })
    if (token.type === 'heading_open') addAnchor(anchors, tokens[i + 1]!)
    for (const child of token.children ?? []) {
      if (child.type === 'link_open') links.push({ text: child.attrGet('href')!, line })
      if (child.type === 'image') links.push({ text: child.attrGet('src')!, line })
      if (child.type === 'html_inline') addHtml(child.content)
      if (child.type === 'code_inline') spans.push({ text: child.content, line })
    }
    marks = new Map()
  }
  return { path, blocks, links, anchors, spans }
}

/** As GitHub makes anchors of headings. */
function addAnchor(anchors: Set<string>, heading: Token): void {
  const slug = (heading.children ?? [])
    .map(({ type, content }) => (type === 'html_inline' ? '' : content))
    .join('')
    .toLowerCase()
    .replace(/[^\p{L}\p{M}\p{N}\p{Pc}\- ]/gu, '')
    .replaceAll(' ', '-')
  let anchor = slug
  for (let n = 1; anchors.has(anchor); n++) anchor = `${slug}-${n}`
  anchors.add(anchor)
}

/** Where a link of a page leads: a path from the root, and what stands behind the #; undefined where it leads out of the repository. */
export function follow(page: Page, target: string): { readonly path: string; readonly anchor: string | undefined } | undefined {
  if (/^[a-z]+:/i.test(target)) return undefined
  const [file, anchor] = decodeURI(target).split('#')
  const path = file === '' ? page.path : relative(root, resolve(root, dirname(page.path), file!)).replaceAll('\\', '/')
  return { path, anchor }
}

/** Whether a path from the root leads to a file or a folder of the repository. */
export function isThere(path: string): boolean {
  return !path.startsWith('..') && existsSync(join(root, path))
}
