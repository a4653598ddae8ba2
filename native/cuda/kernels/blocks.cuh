// What the threads of a block do together, for any number of warps.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace laprox::cuda {

// Instructions that every block needs once are fetched from memory, at a microsecond for some tens of them: one copy each, no unrolled loops.

__device__ __noinline__ inline int64_t block_sum(int64_t value, int64_t* scratch) {  // scratch [32]; every thread gets the sum
#pragma unroll 1
  for (int i = 16; i > 0; i /= 2) value += __shfl_xor_sync(~0u, value, i);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  int64_t sum = 0;
#pragma unroll 1
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += scratch[i];
  return sum;
}

struct Prefix {
  int64_t before;  // the sum of the values of threads before this one
  int64_t total;
};
__device__ __noinline__ inline Prefix block_prefix(int64_t value, int64_t* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int64_t sum = value;
#pragma unroll 1
  for (int i = 1; i < 32; i *= 2) {
    const int64_t other = __shfl_up_sync(~0u, sum, i);
    if (lane >= i) sum += other;
  }
  __syncthreads();
  if (lane == 31) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  int64_t before = 0;
  int64_t total = 0;
#pragma unroll 1
  for (unsigned i = 0; i < blockDim.x / 32; ++i) {
    if (i == threadIdx.x / 32) before = total;
    total += scratch[i];
  }
  return {before + sum - value, total};
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
  __shared__ int64_t scratch[32];
  int64_t before = 0;
#pragma unroll 1
  for (int first = 0; first < size; first += static_cast<int>(blockDim.x)) {
    const int i = first + static_cast<int>(threadIdx.x);
    const Prefix own = block_prefix(i < size ? count(i) : 0, scratch);
    if (i < size) firsts[i] = static_cast<int32_t>(before + own.before);
    before += own.total;
  }
  if (threadIdx.x == 0) firsts[size] = static_cast<int32_t>(before);
}

}  // namespace laprox::cuda
