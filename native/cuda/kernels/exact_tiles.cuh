// Which tile of which segment: the work of a persistent grid, cut on the device from lengths or from lists of tokens.
#pragma once

#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

// Tokens of a call: all of each segment (tokens null) or lists.
struct TokenLists {
  const int32_t* tokens;  // [segments][stride]; null: all
  const int32_t* counts;  // [segments]

  __device__ int count(const Geometry& g, int segment) const {
    return tokens == nullptr ? g.lengths[segment] : min(max(counts[segment], 0), g.lengths[segment]);
  }
  // The i-th token of a segment, or -1 where there is none.
  __device__ int token(const Geometry& g, int segment, int i, int count) const {
    if (i >= count) return -1;
    return tokens == nullptr ? i : tokens[segment * g.stride + i];
  }
};

// first_tiles[x] = tiles of `tile` tokens before segment x; first_tiles[segments] = all. One CTA of 1024 threads.
static __global__ void __launch_bounds__(1024) tile_kernel(Geometry g, TokenLists lists, int tile, int32_t* first_tiles) {
  follow_previous();
  __shared__ int32_t sums[1024];
  int32_t carried = 0;
  const bool failed = *g.status != LPX_OK;
  const int id = static_cast<int>(threadIdx.x);
  for (int first = 0; first < g.segments; first += 1024) {
    const int segment = first + id;
    const int tiles = segment < g.segments && !failed ? (lists.count(g, segment) + tile - 1) / tile : 0;
    sums[id] = tiles;
    __syncthreads();
    for (int step = 1; step < 1024; step *= 2) {
      const int32_t before = id >= step ? sums[id - step] : 0;
      __syncthreads();
      sums[id] += before;
      __syncthreads();
    }
    if (segment < g.segments) first_tiles[segment] = carried + sums[id] - tiles;
    carried += sums[1023];
    __syncthreads();
  }
  if (id == 0) first_tiles[g.segments] = carried;
}

}  // namespace laprox::cuda
