// A child process, told what to do by its argument: see lifecycle.test.ts.
import { readdirSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { AttentionModel, Device, evict, score } from '../../dist/index.js'
import { load } from './load.mjs'

const tasks = {
  async exit() {
    const { model, cache, window, policy } = await load(100_000)
    for (let i = 0; i < 20; i++) score(model, cache, window, policy)
    setTimeout(() => process.exit(7), 100)
  },
  async throw() {
    const { model, cache, window, policy } = await load(100_000)
    for (let i = 0; i < 20; i++) score(model, cache, window, policy).catch(() => {})
    setTimeout(() => {
      throw new Error('thrown in mid-work')
    }, 100)
  },
  /** Calls under way keep a process alive, and nothing else does. */
  async wait() {
    const { model, cache, window, policy } = await load(4000)
    evict(model, cache, window, policy).then(({ report }) => console.log('kept', report.kept))
  },
  async idle() {
    await load(100)
    console.log('idle')
  },
  /** Handles that nobody disposes of: the garbage collector ends their threads and frees their memory. */
  async collect() {
    const threads = () => readdirSync('/proc/self/task').length
    const before = threads()
    const all = []
    for (let i = 0; i < 12; i++) {
      const { model, cache, window, policy } = await load(50, { threads: 1 })
      all.push(model, await evict(model, cache, window, policy))
    }
    const most = threads()
    all.length = 0
    for (let i = 0; i < 100 && threads() > before + 4; i++) {
      globalThis.gc()
      await sleep(20)
    }
    console.log(most > before + 4 ? 'grew' : 'did not grow', threads() <= before + 4 ? 'shrank' : `still ${threads()} of ${most}`)
  },
  /** Handles that go while their calls run. */
  async drop() {
    let pending = []
    for (let i = 0; i < 4; i++) {
      const { model, cache, window, policy } = await load(500, { threads: 1 })
      pending.push(score(model, cache, window, policy))
    }
    globalThis.gc()
    const lengths = (await Promise.all(pending)).map(({ data }) => data.length)
    pending = []
    globalThis.gc()
    await sleep(20)
    globalThis.gc()
    console.log(
      'scored',
      lengths.reduce((a, b) => a + b),
    )
  },
  /** A cache that an eviction has replaced, while the new one is held and nobody has asked for its tensors. */
  async release() {
    const evicted = async () => {
      const { model, cache, window, policy } = await load(50, { threads: 1 })
      return { before: new WeakRef(cache.keys(0)), after: (await evict(model, cache, window, policy)).cache }
    }
    const { before, after } = await evicted()
    for (let i = 0; i < 100 && before.deref() !== undefined; i++) {
      await sleep(20) // a turn that looked at the reference keeps its target
      globalThis.gc()
    }
    console.log(before.deref() === undefined ? 'released' : 'held', after.entries)
  },
  /** A model whose creation is under way when the device goes. */
  async models() {
    for (let i = 0; i < 20; i++) {
      const device = await Device.open('cpu', { threads: 1 })
      const model = AttentionModel.create(device, { layers: 1, queryHeads: 4, kvHeads: 2, headDim: 8 })
      if (i % 2 === 0) model.dispose()
      device.dispose()
      await model.ready
    }
    console.log('created')
  },
}

await tasks[process.argv[2]]()
