import { Command } from 'commander'
import { type BackendInfo, Device, type DeviceInfo, type DeviceName } from '../device.js'
import { LaproxError } from '../errors.js'
import { native } from '../native.js'
import { packageVersion } from './package.js'
import { bytes, table } from './table.js'
import { printJson, type Terminal } from './terminal.js'

/** A device that is there; `reason` says why it cannot be opened all the same. */
type Found = Omit<DeviceInfo, 'version' | 'backends'> | { readonly backend: 'cuda'; readonly index: number; readonly reason: string }

export function infoCommand(terminal: Terminal): Command {
  return new Command('info')
    .description('says what laprox can use here: backends, devices, versions, and why there is no GPU')
    .option('--json', 'print JSON')
    .addHelpText('after', '\nExample:\n  laprox info')
    .action(async ({ json }: { json?: true }) => {
      const { backends, devices } = await findDevices()
      const { abiVersion } = native()
      const versions = { laprox: packageVersion, abi: abiVersion, node: process.version, platform: `${process.platform}-${process.arch}` }
      if (json) printJson(terminal, { ...versions, backends, devices })
      else terminal.stdout.write(`${describe(versions, backends, devices)}\n`)
    })
}

async function findDevices(): Promise<{ backends: readonly BackendInfo[]; devices: Found[] }> {
  const { backends, ...cpu } = await open('cpu')
  const devices: Found[] = [cpu]
  const gpus = backends.find(({ backend }) => backend === 'cuda')?.deviceCount ?? 0
  for (let index = 0; index < gpus; index++) {
    try {
      const { backends: _, ...gpu } = await open(`cuda:${index}`)
      devices.push(gpu)
    } catch (error) {
      if (!(error instanceof LaproxError)) throw error
      devices.push({ backend: 'cuda', index, reason: error.message })
    }
  }
  return { backends, devices }
}

async function open(name: DeviceName): Promise<Omit<DeviceInfo, 'version'>> {
  using device = await Device.open(name)
  const { version: _, ...info } = device.info()
  return info
}

function describe(versions: Readonly<Record<string, string | number>>, backends: readonly BackendInfo[], devices: readonly Found[]): string {
  return table(
    [
      ['laprox', `${versions.laprox} (ABI ${versions.abi})`],
      ['node', `${versions.node}, ${versions.platform}`],
      ...devices.map((device) => [device.backend === 'cpu' ? 'cpu' : `cuda:${device.index}`, describeDevice(device)]),
      ...backends.flatMap(({ backend, available, reason }) => (available ? [] : [[backend, `not available: ${reason}`]])),
    ],
    Number.POSITIVE_INFINITY,
  )
}

function describeDevice(device: Found): string {
  if ('reason' in device) return `cannot be opened: ${device.reason}`
  const { backend, name, threads, instructionSet, memoryBytes } = device
  return [
    ...(backend === 'cpu' ? [`${threads} ${threads === 1 ? 'thread' : 'threads'}`] : [name]),
    instructionSet,
    ...(memoryBytes > 0 ? [bytes(memoryBytes)] : []),
  ].join(', ')
}
