import type { BarSeriesOption, CustomSeriesOption } from 'echarts/charts'
import { BarChart, CustomChart } from 'echarts/charts'
import type { DataZoomComponentOption, GridComponentOption, TooltipComponentOption } from 'echarts/components'
import { DataZoomComponent, GridComponent, TooltipComponent } from 'echarts/components'
import { type ComposeOption, type EChartsType, init, use } from 'echarts/core'
import { CanvasRenderer } from 'echarts/renderers'
import { type Theme, withTheme } from './theme.js'

use([BarChart, CustomChart, DataZoomComponent, GridComponent, TooltipComponent, CanvasRenderer])

export type Option = ComposeOption<BarSeriesOption | CustomSeriesOption | DataZoomComponentOption | GridComponentOption | TooltipComponentOption>

/** Pixels of A4 between margins: pages are laid out for printing without a turn for those who draw. */
const paperWidth = 700

/** Draws a chart into an element, again when the theme changes, and at another size when the element's changes. */
export function chart(host: HTMLElement, option: (theme: Theme) => Option): EChartsType {
  const made = init(host)
  withTheme((theme) => made.setOption({ animation: false, textStyle: { fontFamily: theme.font, color: theme.muted }, ...option(theme) }))
  new ResizeObserver(() => made.resize()).observe(host)
  addEventListener('beforeprint', () => made.resize({ width: Math.min(paperWidth, host.clientWidth) }))
  addEventListener('afterprint', () => made.resize({ width: 'auto' }))
  return made
}

/** What the axes of all charts have in common. */
export function axisStyle(theme: Theme) {
  return {
    axisLine: { show: false, onZero: false },
    axisTick: { show: false },
    axisLabel: { color: theme.muted, fontSize: 12 },
    nameTextStyle: { color: theme.muted, fontSize: 12 },
    splitLine: { lineStyle: { color: theme.line } },
  }
}

/** The line that bars stand on. */
export function baseLine(theme: Theme) {
  return { show: true, onZero: false, lineStyle: { color: theme.line } }
}

/** What the tooltips of all charts have in common. */
export function tooltipStyle(theme: Theme) {
  return {
    backgroundColor: theme.paper,
    borderColor: theme.line,
    textStyle: { color: theme.ink, fontSize: 13 },
    transitionDuration: 0,
    confine: true,
  }
}

/** A series' tooltip: what it says of each item. It is read as HTML: numbers and our own words only. */
export function tells(text: (index: number) => string) {
  return { formatter: (params: unknown) => text((params as { readonly dataIndex: number }).dataIndex) }
}
