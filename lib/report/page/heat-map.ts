import type { CustomSeriesRenderItem } from 'echarts'
import type { EChartsType } from 'echarts/core'
import { grouped, percent } from '../format.js'
import type { Payload } from '../payload.js'
import { axisStyle, chart, type Option } from './chart.js'
import type { Cells, Kept } from './kept.js'
import { Picture } from './picture.js'
import type { Theme } from './theme.js'
import { type Cell, Tip } from './tip.js'
import { type Limits, type Move, moved, moveOf, type View, zoomed } from './view.js'

/** Pixels around the picture; the strip of shares above it, and the slider below, whose handles stand out. */
const margin = { left: 52, right: 40, top: 2, strip: 44, gap: 8, axis: 28, slider: 22, bottom: 12, handle: 3 }

/** Pixels of the picture, at most; fewer where every row then has whole ones. */
const mostHeight = { rows: 520, lines: 640, row: 22 }

/** Positions that fill the picture at the closest. */
const fewestPositions = 8

interface Box {
  readonly x: number
  readonly y: number
  readonly width: number
  readonly height: number
}

/** Rows of a sequence against positions: a picture of the counts between the axes of a chart. */
export class HeatMap {
  readonly #host: HTMLElement
  readonly #payload: Payload
  readonly #kept: Kept
  readonly #chart: EChartsType
  readonly #picture = new Picture()
  readonly #onView: (view: View) => void
  #sequence = 0
  #theme!: Theme
  /** What is drawn now, and where. */
  #drawn: { readonly cells: Cells; readonly view: View; readonly box: Box } | undefined

  /** @param onView is called with what is visible, onPick with a position to be shown in the text */
  constructor(host: HTMLElement, payload: Payload, kept: Kept, onView: (view: View) => void, onPick: (position: number) => void) {
    this.#host = host
    this.#payload = payload
    this.#kept = kept
    this.#onView = onView
    host.tabIndex = 0
    host.style.height = `${cellsTop + this.#height + margin.axis + margin.slider + margin.bottom}px`
    this.#chart = chart(host, (theme) => {
      this.#theme = theme
      return this.#option()
    })
    this.#listen(onPick)
  }

  /** Shows another sequence, all of it. */
  set sequence(sequence: number) {
    this.#sequence = sequence
    this.#chart.setOption(this.#option())
    this.move('all')
  }

  /** Changes the view as keys and buttons do. */
  move(move: Move): void {
    if (this.#drawn !== undefined) this.#show(moved(this.#drawn.view, move, this.#limits))
  }

  get #limits(): Limits {
    const positions = Math.max(1, this.#payload.contexts[this.#sequence]!)
    return { positions, rows: this.#kept.rows, leastPositions: Math.min(positions, fewestPositions * this.#kept.bin) }
  }

  get #height(): number {
    const { rows } = this.#kept
    return rows > mostHeight.lines ? mostHeight.lines : rows * Math.max(1, Math.min(mostHeight.row, Math.floor(mostHeight.rows / rows)))
  }

  #show({ from, to, top, bottom }: View): void {
    const { positions, rows } = this.#limits
    const range = (dataZoomId: string, begin: number, end: number, whole: number) => ({
      dataZoomId,
      start: (100 * begin) / whole,
      end: (100 * end) / whole,
    })
    this.#chart.dispatchAction({ type: 'dataZoom', batch: [range('x', from, to, positions), range('y', top, bottom, rows)] })
  }

  #option(): Option {
    const style = axisStyle(this.#theme)
    const sides = { left: margin.left, right: margin.right }
    const { positions, rows } = this.#limits
    const { layers, kvHeads } = this.#payload
    const horizontal = { type: 'value' as const, min: 0, max: positions }
    return {
      grid: [
        { ...sides, top: margin.top, height: margin.strip },
        { ...sides, top: cellsTop, height: this.#height },
      ],
      xAxis: [
        { ...horizontal, gridIndex: 0, show: false },
        {
          ...horizontal,
          gridIndex: 1,
          ...style,
          splitLine: { show: false },
          axisLabel: {
            ...style.axisLabel,
            hideOverlap: true,
            minMargin: 28,
            formatter: (position: number) => (Number.isInteger(position) ? grouped(position) : ''),
          },
        },
      ],
      yAxis: [
        { gridIndex: 0, min: 0, max: 1, show: false },
        {
          gridIndex: 1,
          min: 0,
          max: rows,
          inverse: true,
          ...style,
          splitLine: { show: false },
          axisTick: {
            show: true,
            length: 6,
            lineStyle: { color: this.#theme.line },
            customValues: Array.from({ length: layers + 1 }, (_, layer) => layer * kvHeads),
          },
          axisLabel: {
            ...style.axisLabel,
            hideOverlap: true,
            customValues: Array.from({ length: layers }, (_, layer) => (layer + 0.5) * kvHeads),
            formatter: (row: number) => String(Math.floor(row / kvHeads)),
          },
          name: 'layer',
          nameLocation: 'middle',
          nameGap: 32,
        },
      ],
      dataZoom: this.#zooms(),
      series: [
        { type: 'custom', id: 'cells', xAxisIndex: 1, yAxisIndex: 1, clip: true, silent: true, data: [[0, 0]], renderItem: this.#renderCells },
        { type: 'custom', id: 'strip', xAxisIndex: 0, yAxisIndex: 0, silent: true, data: [[0, 0]], renderItem: this.#renderStrip },
      ],
    }
  }

  /** Sliders, and dragging in the picture. */
  #zooms(): NonNullable<Option['dataZoom']> {
    const { line, kept, paper, muted } = this.#theme
    const { positions, rows, leastPositions } = this.#limits
    const x = { filterMode: 'none' as const, throttle: 0, xAxisIndex: [0, 1], minSpan: (100 * leastPositions) / positions }
    const y = { filterMode: 'none' as const, throttle: 0, yAxisIndex: [1], minSpan: 100 / rows }
    const inside = { type: 'inside' as const, zoomOnMouseWheel: false, preventDefaultMouseMove: false }
    const slider = {
      type: 'slider' as const,
      showDetail: false,
      showDataShadow: false,
      borderColor: line,
      fillerColor: `${kept}2e`,
      handleStyle: { color: paper, borderColor: muted },
      moveHandleStyle: { color: muted, opacity: 0.5 },
      emphasis: { handleStyle: { color: paper, borderColor: kept }, moveHandleStyle: { color: kept } },
      brushStyle: { color: `${kept}55` },
    }
    const below = { left: margin.left - margin.handle, right: margin.right + margin.handle, bottom: margin.bottom - 1, height: margin.slider }
    const beside = { right: 6, width: 14, top: cellsTop, height: this.#height, show: rows > 1, brushSelect: false }
    return [
      { id: 'x', ...slider, ...x, ...below },
      { id: 'y', ...slider, ...y, ...beside },
      { id: 'x-inside', ...inside, ...x },
      { id: 'y-inside', ...inside, ...y },
    ]
  }

  readonly #renderCells: CustomSeriesRenderItem = (params, api) => {
    const box = params.coordSys as unknown as Box
    const { positions, rows } = this.#limits
    const [left, top] = api.coord([0, 0]) as [number, number]
    const [right, bottom] = api.coord([positions, rows]) as [number, number]
    // In thousandths, so that what is meant to be whole is.
    const along = (pixel: number, first: number, last: number, whole: number) =>
      Math.max(0, Math.min(whole, Math.round((1000 * whole * (pixel - first)) / (last - first)) / 1000))
    const view = {
      from: along(box.x, left, right, positions),
      to: along(box.x + box.width, left, right, positions),
      top: along(box.y, top, bottom, rows),
      bottom: along(box.y + box.height, top, bottom, rows),
    }
    const [columns, lines] = [box.width, box.height].map((size) => Math.max(1, Math.round(size * devicePixelRatio))) as [number, number]
    const cells = this.#kept.cells(this.#sequence, view, columns, lines)
    this.#drawn = { cells, view, box }
    this.#picture.paint(cells, view, this.#kept.kvHeads, this.#theme.ramp, this.#theme.paper, columns, lines)
    this.#onView(view)
    const { x, y, width, height } = box
    return { type: 'image', style: { image: this.#picture.canvas, x, y, width, height } }
  }

  /** The shares of all visible rows together, as high as the largest of them; drawn after the cells, which count them. */
  readonly #renderStrip: CustomSeriesRenderItem = (params) => {
    const { x, y, width, height } = params.coordSys as unknown as Box
    const profile = this.#drawn?.cells.profile ?? new Float32Array(1)
    const most = profile.reduce((a, b) => Math.max(a, b), 0)
    const { kept, muted, font } = this.#theme
    const points: [number, number][] = [[x, y + height]]
    for (const [i, share] of profile.entries()) {
      const level = y + height - (most === 0 ? 0 : (share / most) * (height - 16))
      points.push([x + (i / profile.length) * width, level], [x + ((i + 1) / profile.length) * width, level])
    }
    points.push([x + width, y + height])
    const text = `kept by up to ${percent(most)} of the rows`
    return {
      type: 'group',
      children: [
        { type: 'polygon', shape: { points }, style: { fill: kept, opacity: 0.75 } },
        { type: 'text', style: { text, x, y, fill: muted, fontSize: 12, fontFamily: font } },
      ],
    }
  }

  #listen(onPick: (position: number) => void): void {
    const tip = new Tip(this.#host, this.#payload, this.#kept)
    this.#host.addEventListener('keydown', (event) => {
      const move = moveOf(event)
      if (event.key === 'Enter' && this.#drawn !== undefined) onPick(Math.floor((this.#drawn.view.from + this.#drawn.view.to) / 2))
      if (move === undefined) return
      event.preventDefault()
      tip.hide()
      this.move(move)
    })
    this.#host.addEventListener('wheel', (event) => this.#wheel(event), { capture: true, passive: false })
    const surface = this.#chart.getZr()
    surface.on('mousemove', ({ offsetX, offsetY }) => {
      const cell = this.#cellAt(offsetX, offsetY)
      if (cell === undefined) tip.hide()
      else tip.show(this.#sequence, cell, offsetX, offsetY)
    })
    surface.on('globalout', () => tip.hide())
    surface.on('mousedown', () => this.#host.focus({ preventScroll: true }))
    surface.on('dblclick', ({ offsetX, offsetY }) => {
      const cell = this.#cellAt(offsetX, offsetY)
      if (cell !== undefined) onPick(cell.begin)
    })
  }

  /** Until the heat map is in use, the wheel scrolls the page; a chart would take it always. */
  #wheel(event: WheelEvent): void {
    event.stopPropagation()
    if (this.#drawn === undefined || !(document.activeElement === this.#host || event.ctrlKey || event.metaKey)) return
    event.preventDefault()
    const { view, box } = this.#drawn
    const { left, top } = this.#host.getBoundingClientRect()
    const pixels = (event.deltaY || event.deltaX) * (event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? 1 : 40)
    const factor = 2 ** Math.max(-1, Math.min(1, pixels / 240))
    const about = event.shiftKey ? (event.clientY - top - box.y) / box.height : (event.clientX - left - box.x) / box.width
    this.#show(zoomed(view, event.shiftKey ? 'rows' : 'positions', factor, Math.max(0, Math.min(1, about)), this.#limits))
  }

  /** What is under a pixel. */
  #cellAt(x: number, y: number): Cell | undefined {
    if (this.#drawn === undefined) return undefined
    const { cells, view, box } = this.#drawn
    const [right, down] = [(x - box.x) / box.width, (y - box.y) / box.height]
    if (!(right >= 0 && right < 1 && down >= 0 && down < 1)) return undefined
    const column = Math.floor(right * cells.begin.length)
    const row = Math.min(this.#kept.rows - 1, Math.floor(view.top + down * (view.bottom - view.top)))
    return { row, begin: cells.begin[column]!, end: Math.min(this.#limits.positions, cells.end[column]!) }
  }
}

/** Where the picture begins. */
const cellsTop = margin.top + margin.strip + margin.gap
