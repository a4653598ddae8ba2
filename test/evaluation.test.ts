import { spawnSync } from 'node:child_process'
import { appendFileSync, copyFileSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, it, vi } from 'vitest'
import { run } from '../lib/cli/program.js'
import { openAttentionModel } from '../lib/evaluation/attention-model.js'
import { allContenders, type Contender, quickContenders } from '../lib/evaluation/contenders.js'
import { estimate } from '../lib/evaluation/estimate.js'
import { type Evaluation, evaluate } from '../lib/evaluation/evaluation.js'
import { Experiment } from '../lib/evaluation/experiment.js'
import { Journal } from '../lib/evaluation/journal.js'
import { LanguageModel, likeliest } from '../lib/evaluation/language-model.js'
import { predict } from '../lib/evaluation/prediction.js'
import { readTasks } from '../lib/evaluation/tasks.js'
import { Device, evict, policy, presetNames, Tensor, writeSafetensors } from '../lib/index.js'
import { PaddedPast } from '../lib/onnxruntime.js'

const folder = mkdtempSync(join(tmpdir(), 'laprox-evaluation-'))
afterAll(() => rmSync(folder, { recursive: true }))

const needle = fileURLToPath(new URL('../examples/needle/model', import.meta.url))

/** needle-lm, with prompts of 800 tokens that end as its own do. */
async function shortModel(name: string, prompts = 2): Promise<string> {
  const model = join(folder, name)
  rmSync(model, { recursive: true, force: true })
  mkdirSync(model)
  for (const file of ['config.json', 'extend.onnx', 'model.safetensors']) symlinkSync(join(needle, file), join(model, file))
  const tensors: Record<string, Tensor> = {}
  for (const { name: task, prompts: all } of await readTasks(join(needle, 'tasks.safetensors'))) {
    if (task !== 'multi' && task !== 'text') continue
    const rows = all.slice(0, prompts).map(({ ids, answer }) => [...ids.subarray(-800), ...answer])
    tensors[`${task}.ids`] = new Tensor('int16', Int16Array.from(rows.flat()), [prompts, rows[0]!.length])
    tensors[`${task}.prompt_len`] = new Tensor('int64', BigInt64Array.of(800n), [1])
    tensors[`${task}.answer_len`] = new Tensor('int64', BigInt64Array.of(BigInt(all[0]!.answer.length)), [1])
  }
  await writeSafetensors(join(model, 'tasks.safetensors'), tensors)
  return model
}

const model = await shortModel('model')
const few: Contender[] = (['laprox', 'snapkv', 'streaming'] as const).flatMap((name) =>
  [0.02, 0.2].map((keep) => ({ table: 'presets', name, keep, policy: policy(name, { keep }) }) as const),
)

describe('an evaluation', () => {
  it('says of each prompt what evict and the model say, and nothing where a budget is below what is protected', async () => {
    const { tasks, contenders, setup } = await evaluate({ folder: model, contenders: few, jobs: 1 })
    expect(tasks.map(({ name, judgedBy, full }) => [name, judgedBy, full.length])).toEqual([
      ['multi', 'answer', 2],
      ['text', 'loss', 2],
    ])
    expect(setup).toMatchObject({
      laprox: expect.stringMatching(/^\d+\.\d+\.\d+/),
      node: process.versions.node,
      model: expect.stringMatching(/^[0-9a-f]{64}$/),
    })
    expect(contenders[0]!.figures).toEqual({ multi: [null, null], text: [null, null] })

    const language = await LanguageModel.load(model, 1)
    const device = await Device.open('cpu', { threads: 1 })
    const attention = await openAttentionModel(device, model, language.shape)
    const text = (await readTasks(join(model, 'tasks.safetensors')))[1]!.prompts[1]!
    const { past, queries } = await language.prefill(text.ids, 32)
    const cache = past.cache(device)
    expect(tasks[1]!.full[1]).toBeCloseTo((await predict(language, PaddedPast.from(cache), text.answer)).loss, 5)
    for (const { policy, keep, figures } of contenders) {
      if (keep < 0.1) continue
      const { cache: kept } = await evict(attention, cache, { queries }, policy)
      expect(figures.text![1]).toBeCloseTo((await predict(language, PaddedPast.from(kept), text.answer)).loss, 5)
    }
    await language.release()
    device.dispose()
  })

  it('calls an answer right where greedy decoding would write it', async () => {
    const language = await LanguageModel.load(needle)
    const past = PaddedPast.empty(language.shape)
    const read = await language.extend(past, [300, 301, 302, 303])
    past.append(read)
    const logits = (read.logits!.data as Float32Array).slice(-2048)
    const using = await Device.open('cpu', { threads: 1 })
    const copy = (room: number): PaddedPast => PaddedPast.from(past.cache(using), { room })
    const writing = copy(6)
    const answer = [likeliest(logits)]
    while (answer.length < 6) {
      const outputs = await language.extend(writing, answer.slice(-1))
      writing.append(outputs)
      answer.push(likeliest(outputs.logits!.data as Float32Array))
    }
    expect(await predict(language, copy(0), answer)).toMatchObject({ greedy: true })
    for (let i = 1; i < 6; i++) {
      expect(await predict(language, copy(0), answer.with(i, (answer[i]! + 1) % 2048))).toMatchObject({ greedy: false })
    }
    using.dispose()
    await language.release()
  })

  it('reads windows that lie in two pieces of a prompt', async () => {
    const language = await LanguageModel.load(needle, 1)
    const ids = (await readTasks(join(needle, 'tasks.safetensors')))[0]!.prompts[0]!.ids.subarray(0, 530)
    const { queries } = await language.prefill(ids, 32)
    const past = PaddedPast.empty(language.shape)
    past.append(await language.extend(past, ids.subarray(0, 498)))
    const last = await language.extend(past, ids.subarray(498))
    for (const [l, query] of queries.entries()) {
      const expected = last[`query.${l}`]!
      expect(query.dims).toEqual(expected.dims)
      const furthest = query.data.reduce((most, value, i) => Math.max(most, Math.abs(value - (expected.data as Float32Array)[i]!)), 0)
      expect(furthest).toBeLessThan(1e-3)
    }
    await language.release()
  })

  it('in several processes finds what it finds in one, and goes on from a journal that was cut off', async () => {
    const journal = join(folder, 'several.jsonl')
    const calls: [number, number][] = []
    const alone = await evaluate({ folder: model, contenders: few, jobs: 1 })
    const options = { folder: model, contenders: few, jobs: 2, journal, progress: (done: number, total: number) => void calls.push([done, total]) }
    // Sources need a loader, which the package does not.
    vi.stubEnv('NODE_OPTIONS', '--import tsx')
    try {
      const stopped = new AbortController()
      const stopping = evaluate({ ...options, signal: stopped.signal, progress: (done) => done === 1 && stopped.abort() })
      await expect(stopping).rejects.toMatchObject({ code: 'ABORTED' })
      const begun = readFileSync(journal, 'utf8').trimEnd().split('\n').length - 1
      expect(begun).toBeGreaterThan(0)
      appendFileSync(journal, '{"task":"te')
      const whole = await evaluate(options)
      expect(calls[0]).toEqual([0, 4 - begun])
      expect(calls.at(-1)).toEqual([4 - begun, 4 - begun])
      expect({ ...whole, date: '' }).toEqual({ ...alone, date: '' })
    } finally {
      vi.unstubAllEnvs()
    }
    expect(readFileSync(journal, 'utf8').trimEnd().split('\n')).toHaveLength(5)
    await expect(evaluate({ ...options, contenders: few.slice(1) })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringMatching(/journal of another run, which cannot go on here \(contenders\)/),
    })
    await expect(evaluate({ ...options, prompts: 1 })).rejects.toThrow('(prompts was [["multi",2],["text",2]] and is [["multi",1],["text",1]])')
  })

  it('ends with the error of a process', async () => {
    const broken = await shortModel('broken')
    rmSync(join(broken, 'extend.onnx'))
    writeFileSync(join(broken, 'extend.onnx'), 'no graph')
    vi.stubEnv('NODE_OPTIONS', '--import tsx')
    try {
      await expect(evaluate({ folder: broken, contenders: few, jobs: 2 })).rejects.toMatchObject({
        code: 'BAD_FILE',
        message: expect.stringContaining('extend.onnx could not be opened by ONNX Runtime'),
      })
    } finally {
      vi.unstubAllEnvs()
    }
  })

  it('names prompts that are not there', async () => {
    await using experiment = await Experiment.open(model, [few[0]!.policy])
    await expect(experiment.measure({ task: 'text', prompt: 2 })).rejects.toThrow("there is no prompt 2 of a task 'text'")
    await expect(experiment.measure({ task: 'tekst', prompt: 0 })).rejects.toThrow("there is no prompt 0 of a task 'tekst'")
  })
})

describe('contenders', () => {
  it('are every preset at every share, and variants of which no two are alike', () => {
    const all = allContenders()
    const presets = all.filter(({ table }) => table === 'presets')
    expect(presets.map(({ name, keep }) => `${name} ${keep}`)).toEqual(
      presetNames.flatMap((name) => [0.015, 0.025, 0.05, 0.1, 0.2].map((keep) => `${name} ${keep}`)),
    )
    expect(new Set(all.map(({ policy }) => JSON.stringify(policy))).size).toBe(all.length)
    expect(new Set(all.map(({ name, keep }) => `${name} ${keep}`)).size).toBe(all.length)
    for (const { keep, policy } of all) expect(policy.budget).toEqual({ ratio: keep })
    for (const quick of quickContenders()) expect(all).toContainEqual(quick)
  })
})

describe('journals', () => {
  const subject = { model: 'a', prompts: 3 }

  it('hold what was added, and drop a line that was cut off, in whatever letters', () => {
    const file = join(folder, 'cut.jsonl')
    const journal = Journal.open<string>(file, subject)
    journal.add('one')
    journal.add('zwölf')
    appendFileSync(file, '"dr')
    const again = Journal.open<string>(file, subject)
    expect(again.entries).toEqual(['one', 'zwölf'])
    again.add('three')
    expect(Journal.open<string>(file, subject).entries).toEqual(['one', 'zwölf', 'three'])
  })

  it('begin anew where not even the first line is whole', () => {
    const file = join(folder, 'none.jsonl')
    writeFileSync(file, '{"mod')
    expect(Journal.open<string>(file, subject).entries).toEqual([])
    expect(readFileSync(file, 'utf8')).toBe('{"model":"a","prompts":3}\n')
  })

  it('tell what they cannot go on from', () => {
    const file = join(folder, 'other.jsonl')
    Journal.open(file, subject)
    expect(() => Journal.open(file, { ...subject, prompts: 4 })).toThrow(
      `${file} is the journal of another run, which cannot go on here (prompts was 3 and is 4)`,
    )
    writeFileSync(file, '{"model":"a","prompts":3}\nnonsense\n"x"\n')
    expect(() => Journal.open(file, subject)).toThrow(`${file}: line 2 is no JSON; remove the file to begin anew`)
    expect(() => Journal.open(join(folder, 'nowhere', 'x.jsonl'), subject)).toThrow(expect.objectContaining({ code: 'IO' }))
  })
})

describe('estimates', () => {
  const evaluation = {
    tasks: [
      { name: 'one', judgedBy: 'answer', full: [1, 1, 1, 1] },
      { name: 'text', judgedBy: 'loss', full: [1, 2, 3, 4] },
    ],
    contenders: [{ figures: { one: [1, 1, 1, 0], text: [1.5, 2.5, 3.5, 4.9] } }, { figures: { one: [1, null, 1, 0], text: [1, 1, 1, 1] } }],
  } as unknown as Evaluation
  const [good, partial] = evaluation.contenders as [Evaluation['contenders'][number], Evaluation['contenders'][number]]

  it('are shares with a binomial error, and rises with that of the differences', () => {
    expect(estimate(evaluation, good, 'one')).toEqual({ value: 0.75, error: Math.sqrt((0.75 * 0.25) / 4) })
    const rise = estimate(evaluation, good, 'text')!
    expect([rise.value, rise.error]).toEqual([expect.closeTo(0.6, 12), expect.closeTo(0.1, 12)])
    expect(estimate(evaluation, good, 'one', 3)).toEqual({ value: 1, error: 0 })
    expect(estimate(evaluation, partial, 'one')).toBeUndefined()
    expect(estimate(evaluation, partial, 'one', 1)).toEqual({ value: 1, error: 0 })
  })
})

describe('laprox eval', () => {
  const laprox = async (args: string[], signal = new AbortController().signal): Promise<{ code: number; stdout: string; stderr: string }> => {
    const written = { stdout: '', stderr: '' }
    const stream = (name: keyof typeof written) => ({
      write(text: string) {
        written[name] += text
        return true
      },
    })
    const code = await run(['eval', ...args], { stdout: stream('stdout'), stderr: stream('stderr') as never, signal })
    return { code, ...written }
  }

  it('prints what it found and writes it down; no journal is left', async () => {
    const json = join(folder, 'quick.json')
    const { code, stdout, stderr } = await laprox(['--model', model, '--json', json, '--jobs', '1', '--quick'])
    expect([code, stderr]).toEqual([0, ''])
    const text = readFileSync(json, 'utf8')
    expect(text).toMatch(/"full": \[[-\d.]+, [-\d.]+\]/)
    expect(JSON.parse(text)).toMatchObject({ tasks: [{ name: 'multi' }, { name: 'text' }], contenders: quickContenders() })
    expect(existsSync(join(folder, 'quick.jsonl'))).toBe(false)
    const [note, ...lines] = stdout.trimEnd().split('\n')
    expect(note).toContain('A quick look')
    expect(lines[0]).toBe('2 prompts a task: multi right / rise of the loss on text')
    expect(lines[1]).toMatch(/^full cache: \d\.\d\d \/ \d\.\d{3} nats$/)
    expect(lines.slice(3).map((line) => line.split('  ')[0])).toEqual(['', ...new Set(quickContenders().map(({ name }) => name))])
    expect(lines.at(-1)).toMatch(/^random +- \/ - +\d\.\d\d \/ [+-]\d\.\d{3}$/)
  })

  it('says where it will go on when it was stopped', async () => {
    const json = join(folder, 'stopped.json')
    const stop = new AbortController()
    const stopped = laprox(['--model', model, '--json', json, '--jobs', '1', '--quick'], stop.signal)
    stop.abort(130)
    const { code, stdout, stderr } = await stopped
    expect([code, stdout]).toEqual([130, ''])
    expect(stderr).toBe(`What has been measured is in ${join(folder, 'stopped.jsonl')}: the same command goes on from there.\n`)
    expect(existsSync(json)).toBe(false)
  })

  it('names what a folder lacks, and a file that cannot be written', async () => {
    const lacking = await laprox(['--model', folder, '--json', join(folder, 'x.json')])
    expect([lacking.code, lacking.stderr]).toEqual([1, expect.stringContaining(`${folder} lacks config.json, extend.onnx, `)])
    const nowhere = await laprox(['--model', model, '--json', join(folder, 'nowhere', 'x.json')])
    expect([nowhere.code, nowhere.stderr]).toEqual([1, expect.stringContaining('nowhere/x.json could not be written')])
    expect(await laprox(['--model', model, '--jobs', '0'])).toMatchObject({
      code: 2,
      stderr: expect.stringContaining('Expected an integer of at least 1'),
    })
  })
})

describe('where onnxruntime-node is not installed', () => {
  it('laprox eval says to install it', () => {
    const at = (path: string): string => fileURLToPath(new URL(path, import.meta.url))
    const args = ['--import', 'tsx', '--import', at('support/without-onnxruntime.mjs'), at('../lib/cli/main.ts'), 'eval', '--model', model]
    const { status, stdout, stderr } = spawnSync(process.execPath, args, { encoding: 'utf8' })
    expect(stderr).toContain('an evaluation runs its model in onnxruntime-node, which is not installed: npm install onnxruntime-node')
    expect([status, stdout]).toEqual([1, ''])
  })
})

describe('tasks', () => {
  const write = async (tensors: Record<string, Tensor>): Promise<string> => {
    const file = join(folder, 'tasks.safetensors')
    await writeSafetensors(file, tensors)
    return file
  }
  const ids = new Tensor('int16', new Int16Array(20), [2, 10])
  const one = (value: number): Tensor => new Tensor('int64', BigInt64Array.of(BigInt(value)), [1])

  it('are refused where tensors are missing or do not fit together', async () => {
    const expectation = (tensors: Record<string, Tensor>) => expect(write(tensors).then(readTasks)).rejects
    await expectation({ other: ids }).toThrow("has no tensor '<task>.ids'; it has other")
    await expectation({ 'a.ids': ids, 'a.prompt_length': one(8), 'a.answer_len': one(2) }).toThrow(
      "has no tensor 'a.prompt_len', the closest is 'a.prompt_length'",
    )
    await expectation({ 'a.ids': ids, 'a.prompt_len': ids, 'a.answer_len': one(2) }).toThrow(
      'a.prompt_len is int16 [2, 10]; expected one integer [1]',
    )
    await expectation({ 'a.ids': ids, 'a.prompt_len': one(9), 'a.answer_len': one(2) }).toThrow(
      'a.ids is int16 [2, 10]; expected [prompts, tokens] with 9 tokens',
    )
    await expectation({ 'text.ids': ids, 'text.prompt_len': one(9), 'text.answer_len': one(1) }).toThrow('and 1 of its answer')
    expect(await write({ 'a.ids': ids, 'a.prompt_len': one(8), 'a.answer_len': one(2) }).then(readTasks)).toMatchObject([
      { name: 'a', judgedBy: 'answer' },
    ])
  })
})

describe('a model', () => {
  it('is refused where its configuration lacks a size', async () => {
    const broken = await shortModel('config')
    rmSync(join(broken, 'config.json'))
    await expect(LanguageModel.load(broken)).rejects.toMatchObject({ code: 'IO' })
    writeFileSync(join(broken, 'config.json'), '{')
    await expect(LanguageModel.load(broken)).rejects.toMatchObject({ code: 'BAD_FILE' })
    writeFileSync(join(broken, 'config.json'), '{"num_attention_heads":8,"num_hidden_layers":"six"}')
    await expect(LanguageModel.load(broken)).rejects.toThrow('num_hidden_layers is "six"; expected an integer of at least 1')
    writeFileSync(join(broken, 'config.json'), '{"num_attention_heads":8,"num_hidden_layers":6}')
    await expect(LanguageModel.load(broken)).rejects.toThrow('hidden_size is missing; expected an integer of at least 1')
    copyFileSync(join(needle, 'config.json'), join(broken, 'config.json'))
    const loaded = await LanguageModel.load(broken)
    expect(loaded.shape).toEqual({ layers: 6, queryHeads: 8, kvHeads: 2, headDim: 64 })
    await loaded.release()
  })
})
