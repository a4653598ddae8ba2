// Which tile of which segment: the work of a persistent grid, cut on the device from lengths or (kernels/candidates.cuh) from lists of tokens.
#pragma once

#include "cuda/kernels/blocks.cuh"
#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

// Tokens of a call: all of each segment (tokens null) or lists.
struct TokenLists {
  const int32_t* tokens;      // [segments][stride]; null: all
  const int32_t* counts;      // [segments]
  const uint32_t* all_after;  // not 0: all after all; or null

  // What a kernel begins with.
  __device__ TokenLists now() const { return all_after != nullptr && *all_after != 0 ? TokenLists{} : *this; }

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
static __global__ void __launch_bounds__(1024) tile_kernel(Geometry g, int tile, int32_t* first_tiles) {
  follow_previous();
  const bool failed = *g.status != LPX_OK;
  number_all(g.segments, [&](int segment) { return failed ? 0 : (g.lengths[segment] + tile - 1) / tile; }, first_tiles);
}

}  // namespace laprox::cuda
