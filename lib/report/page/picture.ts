import type { Cells } from './kept.js'
import { shade } from './ramp.js'
import type { View } from './view.js'

/** Pixels of a row that a line between layers may take one of. */
const leastRow = 4

/** The picture of a heat map: one image, painted anew for every view. */
export class Picture {
  readonly canvas: HTMLCanvasElement = document.createElement('canvas')
  /** One pixel a share. */
  readonly #small = document.createElement('canvas')

  /** Paints shares, each stretched to its row, and lines of a colour between layers where rows are high enough. */
  paint(cells: Cells, view: View, kvHeads: number, ramp: Uint32Array, lineColour: string, width: number, height: number): void {
    const lines = Math.max(1, cells.lines)
    this.#small.width = width
    this.#small.height = lines
    const image = new ImageData(width, lines)
    const pixels = new Uint32Array(image.data.buffer)
    const { shares } = cells
    for (let i = 0; i < shares.length; i++) if (shares[i]! >= 0) pixels[i] = ramp[shade(shares[i]!)]!
    this.#small.getContext('2d')!.putImageData(image, 0, 0)

    this.canvas.width = width
    this.canvas.height = height
    const context = this.canvas.getContext('2d')!
    context.imageSmoothingEnabled = false
    const perRow = height / (view.bottom - view.top)
    context.drawImage(this.#small, 0, (cells.firstRow - view.top) * perRow, width, lines * cells.rowsPerLine * perRow)
    if (perRow < leastRow * devicePixelRatio) return
    context.fillStyle = lineColour
    for (let row = Math.max(1, Math.ceil(view.top / kvHeads)) * kvHeads; row < view.bottom; row += kvHeads) {
      context.fillRect(0, Math.round((row - view.top) * perRow), width, Math.max(1, Math.round(devicePixelRatio / 2)))
    }
  }
}
