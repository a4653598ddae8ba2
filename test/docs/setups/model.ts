/** A small model and a cache of it, in host memory: what a page's reader has already. */
import { fromFloat32, type Tensor } from '../../../lib/index.js'
import { Random } from '../../support/random.js'

const random = new Random(1)
const noise = (...dims: number[]): Tensor<'float32'> =>
  fromFloat32(
    'float32',
    Float32Array.from({ length: dims.reduce((product, dim) => product * dim, 1) }, () => random.normal()),
    dims,
  )

export const layers = 2
export const queryHeads = 4
export const kvHeads = 2
export const headDim = 16
export const modelDim = 64
export const tokens = 2048
const perLayer = (make: () => Tensor<'float32'>): Tensor<'float32'>[] => Array.from({ length: layers }, make)
export const outputProjections = perLayer(() => noise(modelDim, queryHeads * headDim))
export const keys = perLayer(() => noise(kvHeads, tokens, headDim))
export const values = perLayer(() => noise(kvHeads, tokens, headDim))
export const queries = perLayer(() => noise(queryHeads, 32, headDim))
