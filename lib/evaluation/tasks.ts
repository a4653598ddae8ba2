import { closest, LaproxError } from '../errors.js'
import { readSafetensors } from '../safetensors.js'
import { describe, type Tensor } from '../tensor.js'

/** Tokens to read and the tokens that follow them. */
export interface Prompt {
  readonly ids: Int32Array
  readonly answer: readonly number[]
}

/** Prompts of one kind. A `text` is judged by the next-token loss, the others by whether the whole answer is right. */
export interface Task {
  readonly name: string
  readonly judgedBy: 'loss' | 'answer'
  readonly prompts: readonly Prompt[]
}

/**
 * Reads every task of a file, those with the shortest answers first: `<task>.ids` [prompts, tokens] of any integers,
 * `<task>.prompt_len` [1] and `<task>.answer_len` [1].
 *
 * @throws LaproxError (as a rejection) `BAD_FILE` for tensors that are missing or do not fit together, and what reading throws
 */
export async function readTasks(file: string): Promise<Task[]> {
  const { tensors } = await readSafetensors(file)
  const names = [...tensors.keys()].filter((key) => key.endsWith('.ids')).map((key) => key.slice(0, -'.ids'.length))
  if (names.length === 0) throw new LaproxError('BAD_FILE', `${file} has no tensor '<task>.ids'; it has ${[...tensors.keys()].join(', ')}`)
  const tasks = names.map((name): Task => {
    const rows = tensors.get(`${name}.ids`)!
    const [promptLength, answerLength] = [length(file, tensors, `${name}.prompt_len`), length(file, tensors, `${name}.answer_len`)]
    // A text's first token is not judged.
    const least = name === 'text' ? 2 : 1
    if (rows.dims.length !== 2 || rows.dims[0] === 0 || promptLength < 1 || answerLength < least || promptLength + answerLength > rows.dims[1]!) {
      throw new LaproxError(
        'BAD_FILE',
        `${file}: ${name}.ids is ${describe(rows)}; expected [prompts, tokens] with ${promptLength} tokens of a prompt and ${answerLength} of its answer`,
      )
    }
    return {
      name,
      judgedBy: name === 'text' ? 'loss' : 'answer',
      prompts: Array.from({ length: rows.dims[0]! }, (_, row) => {
        const { data, offset, size } = rows.at(row).subarray(0, promptLength + answerLength)
        const ids = Int32Array.from({ length: size }, (_, i) => Number(data[offset + i]))
        return { ids: ids.subarray(0, promptLength), answer: [...ids.subarray(promptLength)] }
      }),
    }
  })
  return tasks.sort((a, b) => a.prompts[0]!.answer.length - b.prompts[0]!.answer.length)
}

function length(file: string, tensors: ReadonlyMap<string, Tensor>, name: string): number {
  const tensor = tensors.get(name)
  if (tensor?.size === 1) return Number(tensor.data[tensor.offset])
  const near = tensor === undefined ? closest(name, tensors.keys()) : undefined
  const found =
    tensor === undefined ? `has no tensor '${name}'${near === undefined ? '' : `, the closest is '${near}'`}` : `: ${name} is ${describe(tensor)}`
  throw new LaproxError('BAD_FILE', `${file} ${found}; expected one integer [1]`)
}
