import { BarChart, LineChart } from 'echarts/charts'
import { GridComponent, LegendComponent, TitleComponent } from 'echarts/components'
import { type EChartsCoreOption, init, use } from 'echarts/core'
import { SVGRenderer } from 'echarts/renderers'

use([BarChart, LineChart, GridComponent, LegendComponent, TitleComponent, SVGRenderer])

export interface Axis {
  readonly name: string
  readonly log?: boolean
  /** Where lines and labels stand; without them: whole powers of ten on a logarithmic axis, or 1, 2 and 5 times them where there are few. */
  readonly ticks?: readonly number[]
  readonly format?: (value: number) => string
}

export interface LineChartDescription {
  readonly title: string
  readonly x: Axis
  readonly y: Axis
  readonly lines: readonly { readonly name: string; readonly points: readonly (readonly [x: number, y: number])[] }[]
}

export interface BarChartDescription {
  readonly title: string
  readonly x: Axis
  /** What is compared in each group, from the first bar to the last. */
  readonly series: readonly string[]
  /** From the top to the bottom; one value a series, undefined where there is none. */
  readonly groups: readonly { readonly name: string; readonly values: readonly (number | undefined)[] }[]
}

/** A colour on a light ground and on a dark one; both have a contrast of 4.5 at least, as text needs. */
type Color = readonly [light: string, dark: string]

const ink: Color = ['#1f2328', '#e6edf3']
const faint: Color = ['#59636e', '#9198a1']
const grid: Color = ['#d1d9e0', '#3d444d']
/** What hollow markers are filled with. */
const ground: Color = ['#fff', '#0d1117']
/** Told apart by people who see no red or no green too, and never by colour alone: markers and dashes do it as well. */
const palette: readonly Color[] = [
  ['#0066b3', '#58a6e8'],
  ['#c04f00', '#f0883e'],
  ['#007a5a', '#3fc09a'],
  ['#a3467d', '#d98fbb'],
  ['#8a6100', '#e0b040'],
  ['#00758f', '#4fd0e8'],
  ['#646c75', '#a0a8b1'],
]
const markers = ['circle', 'rect', 'triangle', 'diamond', 'emptyCircle', 'emptyRect', 'emptyTriangle', 'emptyDiamond']
const width = 760

/** Lines with a marker at each point, their names beside them from the one that ends highest down, as SVG. */
export function lineChart({ title, x, y, lines }: LineChartDescription): string {
  for (const { name, points } of lines)
    for (const [at, value] of points)
      if (!drawable(at, x) || !drawable(value, y)) throw new RangeError(`${title}: ${name} has a point (${at}, ${value})`)
  const coordinates = (of: 0 | 1) => lines.flatMap(({ points }) => points.map((point) => point[of]))
  const names = [...lines].sort((a, b) => b.points.at(-1)![1] - a.points.at(-1)![1]).map(({ name }) => name)
  return render(title, 420, {
    legend: { ...legend, data: names, orient: 'vertical', right: 10, top: 68, itemWidth: 28, itemHeight: 9 },
    grid: { left: 64, right: 64 + 7.5 * Math.max(...names.map((name) => name.length)), top: 72, bottom: 56, outerBoundsMode: 'none' },
    xAxis: {
      ...axis(x, coordinates(0)),
      nameLocation: 'middle',
      nameGap: 32,
      ...(x.log !== true && { min: 'dataMin', max: 'dataMax' }),
    },
    yAxis: {
      ...axis(y, coordinates(1)),
      nameLocation: 'end',
      nameTextStyle: { color: faint[0], align: 'left', padding: [0, 0, 0, -56] },
    },
    series: lines.map(({ name, points }, i) => {
      const [color] = palette[i % palette.length]!
      return {
        ...quiet,
        type: 'line',
        name,
        data: points,
        symbol: markers[i % markers.length],
        symbolSize: 8,
        showAllSymbol: true,
        clip: false,
        lineStyle: { color, width: 2, type: i < palette.length ? 'solid' : 'dashed' },
        itemStyle: { color },
      }
    }),
  })
}

/** Groups of bars, each with its value at its end, as SVG. */
export function barChart({ title, x, series, groups }: BarChartDescription): string {
  const values = groups.flatMap((group) => group.values.filter((value) => value !== undefined))
  for (const value of values) if (!drawable(value, x)) throw new RangeError(`${title}: there is a bar of ${value}`)
  const format = x.format ?? String
  return render(title, 110 + groups.length * (22 + 16 * series.length), {
    legend: { ...legend, data: [...series], left: 10, top: 36, itemWidth: 12, itemHeight: 12, icon: 'rect', itemGap: 24 },
    grid: { left: 24 + 7 * Math.max(...groups.map(({ name }) => name.length)), right: 64, top: 66, bottom: 44, outerBoundsMode: 'none' },
    xAxis: { ...axis(x, values), nameLocation: 'middle', nameGap: 26 },
    yAxis: {
      type: 'category',
      data: groups.map(({ name }) => name),
      inverse: true,
      axisLine: { show: false },
      axisTick: { show: false },
      axisLabel: { color: ink[0], fontSize: 13 },
    },
    series: series.map((name, i) => ({
      ...quiet,
      type: 'bar',
      name,
      data: groups.map((group) => group.values[i] ?? '-'),
      barWidth: 13,
      barGap: '20%',
      itemStyle: { color: palette[i % palette.length]![0] },
      label: {
        show: true,
        position: 'right',
        color: ink[0],
        fontSize: 13,
        textBorderWidth: 0,
        formatter: ({ value }: { value: number }) => format(value),
      },
    })),
  })
}

const legend = { textStyle: { color: ink[0], fontSize: 13 } } as const
/** No reaction to a pointer: pages show the file as a picture. */
const quiet = { silent: true, emphasis: { disabled: true } } as const

function drawable(value: number, { log }: Axis): boolean {
  return Number.isFinite(value) && (log !== true || value > 0)
}

function axis({ name, log = false, format, ticks }: Axis, values: readonly number[]) {
  const places = ticks ?? (log ? logarithmicTicks(values) : undefined)
  const low = Math.min(...(places ?? []), ...values)
  return {
    type: log ? 'log' : 'value',
    name,
    nameTextStyle: { color: faint[0], fontSize: 13 },
    axisLine: { show: false },
    axisTick: { show: false, ...(places && { customValues: places }) },
    axisLabel: { color: faint[0], fontSize: 13, hideOverlap: true, ...(format && { formatter: format }), ...(places && { customValues: places }) },
    splitLine: { show: true, lineStyle: { color: grid[0] } },
    ...(log && { min: low, max: Math.max(...places!, ...values), startValue: low }),
  }
}

/** From the last that is no larger than any value to the first that is no smaller. */
function logarithmicTicks(values: readonly number[]): number[] {
  const [low, high] = [Math.min(...values), Math.max(...values)]
  const factors = high / low < 100 ? [1, 2, 5] : [1]
  const first = Math.floor(Math.log10(low))
  const all = Array.from({ length: Math.ceil(Math.log10(high)) - first + 1 }, (_, i) =>
    factors.map((factor) => Number(`${factor}e${first + i}`)),
  ).flat()
  return all.filter((_, i) => (all[i + 1] ?? Number.POSITIVE_INFINITY) > low && (i === 0 || all[i - 1]! < high))
}

/** SVG on a transparent ground whose colours follow the reader's scheme; the same text for the same chart. */
function render(title: string, height: number, option: EChartsCoreOption): string {
  const chart = init(null, null, { renderer: 'svg', ssr: true, width, height })
  chart.setOption({
    animation: false,
    textStyle: { fontFamily: 'system-ui, sans-serif' },
    title: { text: title, left: 10, top: 8, textStyle: { color: ink[0], fontSize: 15, fontWeight: 600 } },
    ...option,
  })
  const drawn = chart.renderToSVGString({ useViewBox: true })
  chart.dispose()
  const dark = [ink, faint, grid, ground, ...palette].map(([on, off]) => `[fill="${on}"]{fill:${off}}[stroke="${on}"]{stroke:${off}}`).join('')
  const style = `<style>@media (prefers-color-scheme:dark){${dark}}</style>`
  return drawn
    .replace(/<style[\s\S]*?<\/style>/g, '') // what a pointer would change
    .replace(/ (class|pointer-events|ecmeta_\w+)="[^"]*"/g, '')
    .replace(/^<svg([^>]*)>/, `<svg$1 role="img">\n<title>${escaped(title)}</title>\n${style}`)
    .replace(/\bzr\d+-/g, '') // ids count the charts of the process
    .replace(/\n{2,}/g, '\n')
    .concat('\n')
}

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;')
}
