import type { CustomSeriesRenderItem } from 'echarts'
import { grouped, percent } from '../format.js'
import type { Payload } from '../payload.js'
import { axisStyle, baseLine, chart, type Option, tells, tooltipStyle } from './chart.js'
import { byId, table } from './dom.js'
import { css } from './ramp.js'
import type { Theme } from './theme.js'

/** Entries there were, kept ones, and their share. */
interface Part {
  readonly kept: number
  readonly length: number
  readonly share: number
}

interface Shares {
  readonly layers: readonly Part[]
  /** [layers, heads] */
  readonly heads: readonly Part[]
  readonly least: number
  readonly most: number
}

const part = (kept: number, length: number): Part => ({ kept, length, share: length === 0 ? 0 : kept / length })

function sharesOf({ layers, kvHeads, sequences, lengths, counts }: Payload, sequence: number): Shares {
  const heads = Array.from({ length: layers * kvHeads }, (_, i) => {
    const segment = (Math.floor(i / kvHeads) * sequences + sequence) * kvHeads + (i % kvHeads)
    return part(counts[segment]!, lengths[segment]!)
  })
  const sums = Array.from({ length: layers }, (_, layer) => {
    const own = heads.slice(layer * kvHeads, (layer + 1) * kvHeads)
    return part(
      own.reduce((sum, { kept }) => sum + kept, 0),
      own.reduce((sum, { length }) => sum + length, 0),
    )
  })
  const all = heads.map(({ share }) => share)
  return { layers: sums, heads, least: Math.min(...all), most: Math.max(...all) }
}

/** Pixels: the bars of the layers, the squares of the heads below them, the axis. */
const heights = { top: 12, bars: 118, gap: 10, heads: 320, mostHead: 18, leastHead: 4, axis: 44 }

/** Heads of at least so many pixels are labelled. */
const labelled = 12

/** The kept share of each layer as bars, of each head as squares below them. */
export class ShareChart {
  readonly #payload: Payload
  readonly #headHeight: number
  readonly #option: (theme: Theme) => Option
  readonly #redraw: () => void
  #shares: Shares

  constructor(payload: Payload) {
    const { layers, kvHeads } = payload
    this.#payload = payload
    this.#shares = sharesOf(payload, 0)
    this.#headHeight = Math.max(heights.leastHead, Math.min(heights.mostHead, Math.floor(heights.heads / kvHeads)))
    const host = byId('shares')
    host.style.height = `${heights.top + heights.bars + heights.gap + kvHeads * this.#headHeight + heights.axis}px`
    const names = Array.from({ length: layers }, (_, layer) => String(layer))
    let theme: Theme
    this.#option = (current) => {
      theme = current
      return { ...this.#axes(theme, names), tooltip: { ...tooltipStyle(theme), trigger: 'item' }, series: this.#series(theme) }
    }
    const drawn = chart(host, this.#option)
    this.#redraw = () => drawn.setOption({ series: this.#series(theme) })
    byId('shares-table')
      .closest('details')!
      .addEventListener('toggle', () => this.#describe())
    this.#describe()
  }

  /** Shows another sequence. */
  set sequence(sequence: number) {
    this.#shares = sharesOf(this.#payload, sequence)
    this.#redraw()
    this.#describe()
  }

  #axes(theme: Theme, names: string[]): Option {
    const { kvHeads } = this.#payload
    const style = axisStyle(theme)
    const sides = { left: 52, right: 12 }
    const prefix = kvHeads > 9 ? '' : 'head '
    const below = heights.top + heights.bars + heights.gap
    return {
      grid: [
        { ...sides, top: heights.top, height: heights.bars },
        { ...sides, top: below, height: kvHeads * this.#headHeight },
      ],
      xAxis: [
        { type: 'category', gridIndex: 0, data: names, ...style, axisLabel: { show: false }, axisLine: baseLine(theme) },
        { type: 'category', gridIndex: 1, data: names, ...style, name: 'layer', nameLocation: 'middle', nameGap: 24 },
      ],
      yAxis: [
        { type: 'value', gridIndex: 0, ...style, min: 0, splitNumber: 3, axisLabel: { ...style.axisLabel, formatter: percent } },
        {
          type: 'category',
          gridIndex: 1,
          inverse: true,
          data: Array.from({ length: kvHeads }, (_, head) => prefix + head),
          ...style,
          axisLabel: { ...style.axisLabel, show: this.#headHeight >= labelled },
        },
      ],
    }
  }

  #series(theme: Theme): NonNullable<Option['series']> {
    const { layers, heads, most } = this.#shares
    const { kvHeads } = this.#payload
    const place = (i: number): [layer: number, head: number] => [Math.floor(i / kvHeads), i % kvHeads]
    const tell = (name: string, { share, kept, length }: Part) => `${name}<br>${percent(share)}: ${grouped(kept)} of ${grouped(length)}`
    const renderHead: CustomSeriesRenderItem = ({ dataIndex }, api) => {
      const [x, y] = api.coord(place(dataIndex)) as [number, number]
      const [width, height] = api.size!([1, 1]) as [number, number]
      const gap = (size: number) => (size > 6 ? 1 : 0)
      return {
        type: 'rect',
        shape: { x: x - width / 2, y: y - height / 2, width: width - gap(width), height: height - gap(height) },
        style: { fill: css(theme.ramp[Math.round((255 * heads[dataIndex]!.share) / (most || 1))]!) },
      }
    }
    return [
      {
        type: 'bar',
        id: 'layers',
        xAxisIndex: 0,
        yAxisIndex: 0,
        data: layers.map(({ share }) => share),
        itemStyle: { color: theme.kept },
        barMaxWidth: 36,
        barCategoryGap: '20%',
        tooltip: tells((layer) => tell(`Layer ${layer}`, this.#shares.layers[layer]!)),
      },
      {
        type: 'custom',
        id: 'heads',
        xAxisIndex: 1,
        yAxisIndex: 1,
        data: heads.map((_, i) => place(i)),
        renderItem: renderHead,
        tooltip: tells((i) => tell(`Layer ${place(i)[0]}, head ${place(i)[1]}`, this.#shares.heads[i]!)),
      },
    ]
  }

  /** In words, and as a table where it is open. */
  #describe(): void {
    const { layers, heads } = this.#shares
    const { kvHeads } = this.#payload
    const [least, most] = [percent(this.#shares.least), percent(this.#shares.most)]
    byId('shares-caption').textContent =
      least === most ? `Every head keeps ${least}.` : `Heads keep ${least} to ${most}; the largest share has the strongest colour.`
    const box = byId('shares-table')
    if (!box.closest('details')!.open) return
    const titles = ['Layer', 'All heads', ...Array.from({ length: kvHeads }, (_, head) => `Head ${head}`)]
    const shares = (layer: number) => [layers[layer]!, ...heads.slice(layer * kvHeads, (layer + 1) * kvHeads)].map(({ share }) => percent(share))
    const rows = layers.map((_, layer) => [String(layer), ...shares(layer)])
    box.replaceChildren(table(titles, rows))
  }
}
