import type { CustomSeriesRenderItem } from 'echarts'
import { grouped, percent, powerOfTen, short } from '../format.js'
import type { Distribution, Payload } from '../payload.js'
import { axisStyle, baseLine, chart, tells, tooltipStyle } from './chart.js'
import { byId, fillWhenOpened, table } from './dom.js'
import type { Theme } from './theme.js'

/** How the ranked scores are distributed, kept ones on top of dropped ones, and where the thresholds lie. */
export function showScores({ distribution }: Payload): void {
  if (distribution === undefined) return
  byId('scores-section').hidden = false
  const { edges, kept, dropped, thresholds, scale } = distribution
  const place = scale === 'log' ? Math.log10 : (value: number) => value
  const [first, last] = [place(edges[0]!), place(edges.at(-1)!)]
  const host = byId('scores')
  host.style.height = '300px'
  let theme!: Theme

  const renderBin: CustomSeriesRenderItem = (params, api) => {
    const i = params.dataIndex
    const [left] = api.coord([place(edges[i]!), 0]) as [number, number]
    const [right] = api.coord([place(edges[i + 1]!), 0]) as [number, number]
    const level = (count: number) => (api.coord([first, count]) as [number, number])[1]
    const bar = (from: number, to: number, fill: string) =>
      ({
        type: 'rect',
        shape: { x: left, y: level(to), width: Math.max(1, right - left - 1), height: level(from) - level(to) },
        style: { fill },
      }) as const
    const [low, high] = [dropped[i]!, dropped[i]! + kept[i]!]
    return { type: 'group', children: [bar(0, low, theme.dropped), bar(low, high, theme.kept)] }
  }
  const renderThreshold: CustomSeriesRenderItem = (params, api) => {
    const { y, height } = params.coordSys as unknown as { y: number; height: number }
    const [x] = api.coord([place(thresholds[params.dataIndex]!), 0]) as [number, number]
    const several = thresholds.length > 1
    return {
      type: 'line',
      shape: { x1: x, x2: x, y1: several ? y + height : y, y2: several ? y + height + 8 : y + height },
      style: { stroke: theme.threshold, lineWidth: several ? 1 : 2, opacity: several ? 0.7 : 1 },
    }
  }
  const span = (i: number) => `${short(edges[i]!)} to ${short(edges[i + 1]!)}`
  chart(host, (current) => {
    theme = current
    const style = axisStyle(theme)
    return {
      tooltip: { ...tooltipStyle(theme), trigger: 'item' },
      grid: { left: 64, right: 16, top: 30, bottom: 52 },
      xAxis: {
        type: 'value',
        min: first,
        max: last,
        ...style,
        splitLine: { show: false },
        axisLine: baseLine(theme),
        name: 'pooled score',
        nameLocation: 'middle',
        nameGap: 32,
        ...(scale === 'log' && last - first > 2 ? { minInterval: 1 } : {}),
        axisLabel: {
          ...style.axisLabel,
          margin: 14,
          showMinLabel: scale === 'linear' || last - first <= 2,
          showMaxLabel: scale === 'linear' || last - first <= 2,
          hideOverlap: true,
          formatter: (value: number) => (scale === 'linear' ? short(value) : Number.isInteger(value) ? powerOfTen(value) : short(10 ** value)),
        },
      },
      yAxis: {
        type: 'value',
        ...style,
        name: 'entries',
        nameTextStyle: { ...style.nameTextStyle, align: 'right' },
        axisLabel: { ...style.axisLabel, formatter: compact },
      },
      series: [
        {
          type: 'custom',
          id: 'bins',
          data: kept.map((count, i) => [(place(edges[i]!) + place(edges[i + 1]!)) / 2, count + dropped[i]!]),
          renderItem: renderBin,
          tooltip: tells((i) => `${span(i)}<br>${grouped(kept[i]!)} kept, ${grouped(dropped[i]!)} dropped`),
        },
        { type: 'custom', id: 'thresholds', silent: true, data: thresholds.map((threshold) => [place(threshold), 0]), renderItem: renderThreshold },
      ],
    }
  })
  byId('scores-caption').textContent = describe(distribution)
  fillWhenOpened('scores-table', () =>
    table(
      ['Pooled score', 'Kept', 'Dropped'],
      kept.map((count, i) => [span(i), grouped(count), grouped(dropped[i]!)]),
    ),
  )
}

/** 12000 -> '12k' */
function compact(count: number): string {
  return count >= 1e6 ? `${count / 1e6}M` : count >= 1e4 ? `${count / 1e3}k` : grouped(count)
}

/** What the picture does not say. */
function describe({
  thresholds,
  part,
  underThreshold,
  floors,
  kept,
  dropped,
  zero,
  below,
  edges,
  protected: held,
  nonFinite,
  scale,
}: Distribution): string {
  const sentences: string[] = []
  const many = [...kept, ...dropped, ...zero, ...below].reduce((sum, count) => sum + count, 0)
  sentences.push(`${grouped(many)} entries were ranked, by their pooled scores.`)
  if (thresholds.length === 1) sentences.push(`The threshold is ${short(thresholds[0]!)}.`)
  else if (thresholds.length > 1) {
    const [least, most] = [Math.min(...thresholds), Math.max(...thresholds)]
    sentences.push(`Each ${part} has its threshold, a mark under the axis: ${grouped(thresholds.length)} from ${short(least)} to ${short(most)}.`)
  } else sentences.push('There is no threshold: nothing was dropped.')
  if (underThreshold > 0) {
    const why = floors ? 'are kept because of the policy’s floor' : 'were kept nevertheless: these are not the scores that were ranked'
    sentences.push(`${grouped(underThreshold)} entries below it ${why}.`)
  }
  const apart = ([ofKept, ofDropped]: readonly [number, number]) => `${grouped(ofKept + ofDropped)} (${grouped(ofKept)} kept)`
  if (scale === 'log' && zero[0] + zero[1] > 0) sentences.push(`Scores of zero have no place on this axis: ${apart(zero)}.`)
  if (below[0] + below[1] > 0) sentences.push(`Smaller than ${short(edges[0]!)} are ${apart(below)} more.`)
  if (held > 0) sentences.push(`${grouped(held)} protected entries are kept without ranking (${percent(held / (held + many + nonFinite))} of all).`)
  if (nonFinite > 0) sentences.push(`${grouped(nonFinite)} scores are not finite; their entries are kept.`)
  return sentences.join(' ')
}
