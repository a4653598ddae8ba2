import { InvalidArgumentError } from 'commander'
import type { DeviceName } from '../device.js'
import { suggest } from '../errors.js'
import { type PresetName, presetNames } from '../policy.js'

/**
 * Reads a share of a cache: '5%' and '0.05' are 0.05.
 *
 * @throws InvalidArgumentError
 */
export function readShare(text: string): number {
  const percent = text.endsWith('%')
  const digits = percent ? text.slice(0, -1) : text
  // Nothing at all would be the number 0, and ' ' too.
  const number = /^[\d.]/.test(digits) ? Number(digits) : Number.NaN
  const share = percent ? number / 100 : number
  if (share > 0 && share <= 1) return share
  const hint = !percent && number > 1 && number <= 100 ? `; did you mean ${number}%?` : ''
  throw new InvalidArgumentError(`Expected a share of the cache, such as 5% or 0.05${hint}`)
}

/** @throws InvalidArgumentError names the closest preset */
export function readPolicyName(text: string): PresetName {
  if ((presetNames as readonly string[]).includes(text)) return text as PresetName
  throw new InvalidArgumentError(`'${text}' is no policy; ${suggest(text, presetNames)}`)
}

/** @throws InvalidArgumentError */
export function readDeviceName(text: string): DeviceName {
  if (/^(auto|cpu|cuda(:\d{1,4})?)$/.test(text)) return text as DeviceName
  throw new InvalidArgumentError(`'${text}' is no device; ${suggest(text, ['auto', 'cpu', 'cuda', 'cuda:0'])}`)
}

/** A reader of integers of at least 1. */
export function readCount(text: string): number {
  const count = Number(text)
  if (/^\d+$/.test(text) && count >= 1 && Number.isSafeInteger(count)) return count
  throw new InvalidArgumentError('Expected an integer of at least 1')
}

/** A reader of items separated by commas, each once. */
export function readList<T>(read: (item: string) => T): (text: string) => T[] {
  return (text) => {
    const items = text.split(',').map((item) => item.trim())
    if (items.includes('')) throw new InvalidArgumentError('The list has an empty item')
    return [...new Set(items.map(read))]
  }
}
