import { type Policy, type PolicyOptions, type Pooling, type PresetName, policy, presetNames } from '../policy.js'

/** A policy that takes part in an evaluation. */
export interface Contender {
  /** The table it belongs to. */
  readonly table: 'presets' | 'rules' | 'window' | 'pooling'
  /** Of the preset, and what differs from it: `laprox, window 8`. */
  readonly name: string
  /** The share of the cache that it keeps. */
  readonly keep: number
  readonly policy: Policy
}

const keeps = [0.015, 0.025, 0.05, 0.1, 0.2] as const
/** Of the extra tables. At 1.5 % a window of 64 rows, which is protected, would not leave room for anything else. */
const few = [0.025, 0.05] as const
const max = (width: number): Pooling => ({ kind: 'max', width })

/**
 * Who takes part: every preset at every share; three rules of which no preset is made, but of which the reference has figures;
 * `laprox` and `snapkv` with other windows; `laprox` with other poolings. The presets themselves are part of each extra table, too.
 */
export function allContenders(): Contender[] {
  return [
    ...presetNames.flatMap((name) => contend('presets', name, keeps)),
    ...contend('rules', 'laprox-removal', [0.015, 0.025, 0.05, 0.1], 'max 9', { pooling: max(9) }),
    ...contend('rules', 'laprox', [0.015, 0.025, 0.05, 0.1], 'scope layer', { scope: 'layer' }),
    ...contend('rules', 'snapkv', [0.015, 0.025, 0.05, 0.1], 'max 7, scope model', { pooling: max(7), scope: 'model' }),
    ...(['laprox', 'snapkv'] as const).flatMap((name) =>
      [8, 16, 64].flatMap((window) => contend('window', name, few, `window ${window}`, { window })),
    ),
    ...contend('pooling', 'laprox', few, 'no pooling', { pooling: { kind: 'none' } }),
    ...[3, 5, 9, 15].flatMap((width) => contend('pooling', 'laprox', few, `max ${width}`, { pooling: max(width) })),
  ]
}

/** Those of a quick look. */
export function quickContenders(): Contender[] {
  return (['laprox', 'laprox-removal', 'adakv', 'snapkv', 'streaming', 'random'] as const).flatMap((name) => contend('presets', name, few))
}

function contend(
  table: Contender['table'],
  preset: PresetName,
  shares: readonly number[],
  what?: string,
  options?: Omit<PolicyOptions, 'keep'>,
): Contender[] {
  const name = what === undefined ? preset : `${preset}, ${what}`
  return shares.map((keep) => ({ table, name, keep, policy: policy(preset, { ...options, keep }) }))
}
