// Sums over the threads of a block, for any number of warps.
#pragma once

#include <cuda_runtime.h>

namespace laprox::cuda {

template <typename T>
__device__ T block_sum(T value, T* scratch) {  // scratch [32]; every thread gets the sum
  for (int i = 16; i > 0; i /= 2) value += __shfl_xor_sync(~0u, value, i);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += scratch[i];
  return sum;
}

// The sum of the values of threads before this one; `total` of all.
template <typename T>
__device__ T block_prefix(T value, T* scratch, T& total) {
  const int lane = threadIdx.x % 32;
  T sum = value;
  for (int i = 1; i < 32; i *= 2) {
    const T other = __shfl_up_sync(~0u, sum, i);
    if (lane >= i) sum += other;
  }
  __syncthreads();
  if (lane == 31) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  T before = 0;
  total = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) {
    if (i == threadIdx.x / 32) before = total;
    total += scratch[i];
  }
  return before + sum - value;
}

}  // namespace laprox::cuda
