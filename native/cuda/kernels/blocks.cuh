// What the threads of a block do together, for any number of warps.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

// Whether this block is the last of `blocks` to come here: then it sees what all of them have written.
__device__ inline bool last_to_arrive(uint32_t* arrivals, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrivals, 1u) + 1 == blocks;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// firsts[x] = the sum of count(i) over i < x, for x from 0 to `size`.
template <typename Count>
__device__ void number_all(int size, Count&& count, int32_t* firsts) {
  __shared__ int32_t scratch[32];
  int32_t before = 0;
  for (int first = 0; first < size; first += static_cast<int>(blockDim.x)) {
    const int i = first + static_cast<int>(threadIdx.x);
    int32_t total = 0;
    const int32_t own = block_prefix(i < size ? static_cast<int32_t>(count(i)) : 0, scratch, total);
    if (i < size) firsts[i] = before + own;
    before += total;
  }
  if (threadIdx.x == 0) firsts[size] = before;
}

}  // namespace laprox::cuda
