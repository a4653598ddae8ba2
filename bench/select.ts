import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Device, type Policy, policies, Scores, select as selectFrom } from 'laprox'
import { Random } from '#lib/cli/random'
import { timing } from '#lib/cli/timing'
import { goal, type Measurement, type Settings, shareOf } from './measurement.js'
import { time } from './timing.js'
import { faster, readRate, scratchFolder, yardstick } from './yardstick.js'

/** Choosing 5 % of a whole model's scores, beside a sort in JavaScript and std::nth_element in C++. */
export async function* select({ quick, threads }: Settings): AsyncGenerator<Measurement> {
  using device = await Device.open('cpu', { threads })
  const rounds = quick ? 3 : 21
  const scores = heavyTailedScores(quick ? 1 : 32, 8, 32768)
  const plain = policies.laprox({ keep: 0.05, pooling: { kind: 'none' }, sinks: 0, recent: 0 })
  const parameters = { layers: scores.layers, kvHeads: scores.kvHeads, tokens: scores.lengths[0]!, scores: scores.data.length }
  const choose = (policy: Policy) => () => selectFrom(scores, policy, { device })

  const before = await readRate(threads)
  const copy = new Float32Array(scores.data.length)
  const { laprox, pooled, sort } = await time(
    {
      laprox: choose(plain),
      pooled: choose(policies.laprox({ keep: 0.05 })),
      sort: async () => {
        copy.set(scores.data)
        const start = performance.now()
        copy.sort()
        return performance.now() - start
      },
    },
    rounds,
  )
  const rate = faster(before, await readRate(threads))
  const selection = await selectFrom(scores, plain, { device })
  const nth = await nthElement(scores, selection.tokens, rounds)

  yield {
    benchmark: 'select',
    name: 'a selection of 5 % of all scores',
    parameters: { ...parameters, pooling: 'none', threads },
    ...laprox,
    bytes: scores.data.byteLength,
    ...shareOf(rate, scores.data.byteLength, laprox),
    goals: [
      goal('speed relative to sorting in JavaScript', sort.msMedian / laprox.msMedian, 'at least', 10, 'times'),
      ...(nth ? [goal('speed relative to std::nth_element and a scan on one thread', nth.msMedian / laprox.msMedian, 'at least', 2, 'times')] : []),
    ],
    note: 'bytes: of the scores, counted once',
  }
  yield {
    benchmark: 'select',
    name: 'the same with the preset laprox: max-pooling over 7 tokens, 4 sinks, the last 32 protected',
    parameters: { ...parameters, pooling: 'max 7', threads },
    ...pooled,
    bytes: scores.data.byteLength,
    ...shareOf(rate, scores.data.byteLength, pooled),
  }
  yield {
    benchmark: 'select',
    name: 'a sort of the same scores in JavaScript',
    parameters: { ...parameters, threads: 1 },
    ...sort,
    note: 'the sort is Float32Array.prototype.sort alone, without its copy of the scores or any choice of tokens',
  }
  if (nth) {
    yield {
      benchmark: 'select',
      name: 'the same selection by std::nth_element and a scan in C++',
      parameters: { ...parameters, pooling: 'none', threads: 1 },
      ...nth,
      note: 'the tokens of std::nth_element and a scan are the same, one by one',
    }
  }
}

/** Of one sequence, log-normal. */
function heavyTailedScores(layers: number, kvHeads: number, tokens: number): Scores {
  const random = new Random(1)
  const data = new Float32Array(layers * kvHeads * tokens).map(() => Math.exp(2 * random.noise()))
  return Scores.from({ layers, kvHeads, lengths: new Int32Array(layers * kvHeads).fill(tokens), data })
}

/** Throws where it chooses others than `tokens`; undefined where it cannot be compiled. */
async function nthElement(scores: Scores, tokens: Int32Array, rounds: number) {
  const [input, output] = [join(scratchFolder(), 'scores'), join(scratchFolder(), 'tokens')]
  await writeFile(input, scores.data)
  const seconds = await yardstick('nth_element.cpp', input, scores.lengths[0]!, tokens.length, rounds, output)
  if (seconds === undefined) return undefined
  const chosen = await readFile(output)
  if (chosen.compare(Buffer.from(tokens.buffer, tokens.byteOffset, tokens.byteLength)) !== 0) throw new Error('std::nth_element chooses other tokens')
  return timing(seconds.map((value) => value * 1000))
}
