import { Tensor } from 'onnxruntime-node'

/** Tensors [heads, rows, ...] of float32: what a decoder keeps of its tokens. A row is whatever follows the second dimension. */

/** `tensor` with the rows of `more` after its own. */
export function appendRows(tensor: Tensor, more: Tensor): Tensor {
  const [heads, rows, moreRows, width] = [tensor.dims[0]!, tensor.dims[1]!, more.dims[1]!, rowWidth(more)]
  const [head, data, moreData] = [(rows + moreRows) * width, floats(tensor), floats(more)]
  const joined = new Float32Array(heads * head)
  for (let h = 0; h < heads; h++) {
    joined.set(data.subarray(h * rows * width, (h + 1) * rows * width), h * head)
    joined.set(moreData.subarray(h * moreRows * width, (h + 1) * moreRows * width), h * head + rows * width)
  }
  return new Tensor('float32', joined, [heads, rows + moreRows, ...more.dims.slice(2)])
}

/** The last `count` rows of each head, or all where there are fewer. */
export function lastRows(tensor: Tensor, count: number): Tensor {
  const [heads, rows, width] = [tensor.dims[0]!, tensor.dims[1]!, rowWidth(tensor)]
  const [kept, data] = [Math.min(count, rows), floats(tensor)]
  const last = new Float32Array(heads * kept * width)
  for (let h = 0; h < heads; h++) {
    last.set(data.subarray(((h + 1) * rows - kept) * width, (h + 1) * rows * width), h * kept * width)
  }
  return new Tensor('float32', last, [heads, kept, ...tensor.dims.slice(2)])
}

/** The elements of a float32 tensor. */
export function floats(tensor: Tensor): Float32Array {
  return tensor.data as Float32Array
}

function rowWidth(tensor: Tensor): number {
  return tensor.dims.slice(2).reduce((product, dim) => product * dim, 1)
}
