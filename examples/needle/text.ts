import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Tokenizer } from '@huggingface/tokenizers'
import { evidence } from './evidence.js'

/** Shows tokens as text. */
export class Text {
  private constructor(private readonly tokenizer: Tokenizer) {}

  /** Reads tokenizer.json of a folder. */
  static async load(folder: string): Promise<Text> {
    return new Text(new Tokenizer(JSON.parse(await readFile(join(folder, 'tokenizer.json'), 'utf8')), {}))
  }

  /** The text of each token by itself. */
  each(tokens: Int32Array): string[] {
    return Array.from(tokens, (token) => this.#decode([token]))
  }

  /** The text of tokens on one line: line ends as ⏎, other blanks as one space, pieces of characters left out. */
  line(tokens: ArrayLike<number>): string {
    return this.#decode(tokens)
      .replace(/[^\S\n]+/g, ' ')
      .replace(/\s*\n\s*/g, '⏎')
      .replaceAll('\uFFFD', '')
  }

  /** The question, which is the prompt's last line, and the text around the places that it asks for. */
  questionAndEvidence(prompt: Int32Array): { question: string; passages: string[] } {
    let begin = prompt.length - 1
    while (begin > 0 && !this.#decode(prompt.subarray(begin)).includes('\n')) begin--
    const places = evidence(prompt, begin)
    return {
      question: this.line(prompt.subarray(begin)).replace('⏎', '').trim(),
      passages: places.map((place) => `…${this.line(prompt.subarray(Math.max(0, place - 10), place + 20))}…`),
    }
  }

  #decode(tokens: ArrayLike<number>): string {
    return this.tokenizer.decode(Array.from(tokens), { clean_up_tokenization_spaces: false })
  }
}
