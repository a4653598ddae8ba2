import { readSafetensors, type Tensor } from 'laprox'
import { UsageError } from './options.js'

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
 * Reads every task of a file, those with the shortest answers first: `<task>.ids` [prompts, tokens], `<task>.prompt_len` [1]
 * and `<task>.answer_len` [1].
 */
export async function readTasks(file: string): Promise<Task[]> {
  const { tensors } = await readSafetensors(file)
  const names = [...tensors.keys()].filter((key) => key.endsWith('.ids')).map((key) => key.slice(0, -'.ids'.length))
  const tasks = names.map((name): Task => {
    const rows = tensors.get(`${name}.ids`)!
    const [promptLength, answerLength] = [length(tensors, `${name}.prompt_len`), length(tensors, `${name}.answer_len`)]
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

function length(tensors: ReadonlyMap<string, Tensor>, name: string): number {
  const tensor = tensors.get(name)
  if (tensor?.size !== 1) throw new UsageError(`the file of tasks has no tensor '${name}' [1]`)
  return Number(tensor.data[tensor.offset])
}
