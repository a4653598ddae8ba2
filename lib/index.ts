/**
 * laprox: KV-cache eviction by what each entry contributes to the model's output.
 *
 *     const device = await Device.open('auto')
 *     const model = AttentionModel.create(device, { layers, queryHeads, kvHeads, headDim, outputProjections })
 *     const cache = KvCache.from(device, { keys, values })
 *     const { cache: kept, selection, report } = await evict(model, cache, { queries }, policies.laprox({ keep: 0.05 }))
 *
 * @module laprox
 */
export { type CacheDescription, type ContiguousDescription, type Integers, KvCache, type PagedDescription, type RaggedDescription } from './cache.js'
export type { CallOptions } from './call.js'
export { type Capture, type CaptureOptions, readCapture } from './capture.js'
export { compact, type InPlaceTarget, type PagesTarget, type RaggedTarget, type Target } from './compact.js'
export { type BackendInfo, Device, type DeviceInfo, type DeviceName, type DeviceOptions, type InstructionSet, type Kernels } from './device.js'
export { LaproxError, type LaproxErrorCode } from './errors.js'
export { type Eviction, type EvictOptions, type EvictReport, evict } from './evict.js'
export { type Fidelity, type FidelityOptions, fidelity, type LaterQueries, type RelativeErrors } from './fidelity.js'
export { AttentionModel, type ModelDescription, type PerLayer } from './model.js'
export {
  type Aggregation,
  type AttentionStatistic,
  type Budget,
  type NonFinite,
  type Policies,
  type Policy,
  type PolicyMaker,
  type PolicyOptions,
  type Pooling,
  type PresetName,
  type PyramidOptions,
  policies,
  policy,
  presetNames,
  type RandomOptions,
  type Scope,
  type ScoreRule,
  type ValueStatistic,
  validatePolicy,
} from './policy.js'
export { type ReportContents, type ReportSummary, writeReport } from './report/report.js'
export { type ReadSafetensorsOptions, readSafetensors, type SafetensorsFile, type WriteSafetensorsOptions, writeSafetensors } from './safetensors.js'
export { Scores, type ScoresDescription, score } from './score.js'
export { Selection, type SelectionDescription, type SelectOptions, type SelectReport, select, selectFrom } from './selection.js'
export {
  type Float16Data,
  type FloatType,
  fromFloat32,
  Tensor,
  type TensorDataMap,
  type TensorInput,
  type TensorLayout,
  type TensorType,
  toFloat32,
} from './tensor.js'
export type { Window } from './window.js'
