import { percent, relative } from '../format.js'
import type { Payload } from '../payload.js'
import { axisStyle, baseLine, chart, tooltipStyle } from './chart.js'
import { byId, fillWhenOpened, table } from './dom.js'

/** The relative error of each layer's output, over the window and over later queries. */
export function showFidelity({ fidelity }: Payload): void {
  if (fidelity === undefined) return
  byId('fidelity-section').hidden = false
  const { layers } = fidelity
  const hasLater = layers.some(({ later }) => later !== undefined)
  byId('later-key').hidden = !hasLater
  const host = byId('fidelity')
  host.style.height = '240px'
  chart(host, (theme) => {
    const style = axisStyle(theme)
    const bars = (id: 'window' | 'later', color: string) => ({
      type: 'bar' as const,
      id,
      name: id === 'window' ? 'window’s queries' : 'later queries',
      data: layers.map((layer) => layer[id] ?? '-'),
      itemStyle: { color },
      barMaxWidth: 24,
      barGap: '10%',
      barCategoryGap: '25%',
      tooltip: { valueFormatter: (value: unknown) => (typeof value === 'number' ? percent(value) : '') },
    })
    return {
      tooltip: { ...tooltipStyle(theme), trigger: 'item' },
      grid: { left: 52, right: 12, top: 12, bottom: 44 },
      xAxis: {
        type: 'category',
        data: layers.map((_, layer) => String(layer)),
        ...style,
        axisLine: baseLine(theme),
        name: 'layer',
        nameLocation: 'middle',
        nameGap: 24,
      },
      yAxis: { type: 'value', min: 0, splitNumber: 4, ...style, axisLabel: { ...style.axisLabel, formatter: (value: number) => percent(value) } },
      series: [bars('window', theme.kept), ...(hasLater ? [bars('later', theme.later)] : [])],
    }
  })
  const later = fidelity.later === undefined ? '' : `, ${relative(fidelity.later)} over later queries`
  byId('fidelity-caption').textContent =
    `The difference from the full cache’s output, relative to its norm. All layers together: ${relative(fidelity.window)} over the window’s queries${later}.`
  const titles = ['Layer', 'Window', ...(hasLater ? ['Later'] : [])]
  fillWhenOpened('fidelity-table', () =>
    table(
      titles,
      layers.map(({ window, later }, layer) => [String(layer), relative(window), ...(hasLater ? [later === undefined ? '' : relative(later)] : [])]),
    ),
  )
}
