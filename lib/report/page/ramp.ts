import { percent } from '../format.js'
import { make } from './dom.js'

/** 256 colours between equally spaced ones `#rrggbb`, their bytes in the order of ImageData. */
export function rampOf(stops: readonly string[]): Uint32Array {
  const colours = stops.map((stop) => [1, 3, 5].map((at) => Number.parseInt(stop.slice(at, at + 2), 16)))
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (colours.length - 1)
    const low = Math.min(colours.length - 2, Math.floor(at))
    const [r, g, b] = colours[low]!.map((from, c) => Math.round(from + (at - low) * (colours[low + 1]![c]! - from))) as [number, number, number]
    return 0xff000000 + (b << 16) + (g << 8) + r
  })
}

/** A colour of a ramp, for CSS. */
export function css(colour: number): string {
  return `rgb(${colour & 255}, ${(colour >>> 8) & 255}, ${(colour >>> 16) & 255})`
}

/** The place of a kept share on the ramp: of its root, since shares of a few per cent are what there is to tell apart. */
export function shade(share: number): number {
  return Math.round(255 * Math.sqrt(share))
}

/** The colours of {@link shade}, as a legend with marks at some shares. */
export function showRamp(host: HTMLElement, ramp: Uint32Array): void {
  const stops = Array.from({ length: 17 }, (_, i) => css(ramp[Math.round((i / 16) * 255)]!))
  const band = make('div', [], { class: 'band' })
  band.style.background = `linear-gradient(to right, ${stops.join(', ')})`
  const labels = [0, 0.05, 0.25, 1].map((share) => {
    const label = make('span', percent(share))
    label.style.left = `${100 * Math.sqrt(share)}%`
    return label
  })
  host.replaceChildren(band, make('div', labels, { class: 'marks' }))
}
