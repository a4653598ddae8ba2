// Which entries are kept, given scores: thresholds of the parts (rank.cuh), then the kept tokens (emit.cuh).
#pragma once

#include <cooperative_groups.h>

#include "cuda/kernels/emit.cuh"

namespace laprox::cuda {

inline constexpr int kMostPasses = 12;  // floors, in the smallest histograms, take 11

struct Passes {
  Pass pass[kMostPasses];
  int32_t count;
  int32_t bits;  // of the largest histogram
};

// The passes of a search, one after the other: as many blocks as there is room for, all of them at work at once (a cooperative launch), each with its
// share of the tiles.
__global__ void __launch_bounds__(kRankThreads)
    select_entries(const __grid_constant__ RankView p, const __grid_constant__ Passes passes, const __grid_constant__ Counts counts,
                   const __grid_constant__ SelectionView out, lpx_report* report, const __grid_constant__ ScoresReport how) {
  follow_previous();
  const auto grid = cooperative_groups::this_grid();
  const int segments = p.scores.segments();
  __shared__ Share share;
  if (threadIdx.x < 32) {
    const int64_t tiles = p.tile_start[segments];
    const auto first = static_cast<int>(tiles * blockIdx.x / gridDim.x);
    const auto end = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x);
    const int segment = first < end ? segment_of_tile_together(p.tile_start, segments, first) : 0;
    if (threadIdx.x == 0) share = {first, end, segment};
  }
  __syncthreads();
  bool met = true;
  for (int i = 0; i < passes.count; ++i) {
    const Pass& pass = passes.pass[i];
    if (!met) grid.sync();
    met = true;
    if (pass.again && *p.search[kOfRule].ranks.failures == 0) continue;  // what all have met about: nobody is still adding to it
    met = false;
    // Another block may find an error in this very pass: a block that has seen it has nothing to do, and still meets the others.
    const bool well = __syncthreads_and(*static_cast<volatile int32_t*>(p.scores.status) == LPX_OK) != 0;
    if (well) {
      switch (pass.kind) {
        case Pass::Kind::kCount: count_kept(p, pass, counts, out, report, how); break;
        case Pass::Kind::kEmit: emit(p, pass, counts, out); break;
        default: search(p, pass, share); break;
      }
    } else if (pass.kind == Pass::Kind::kCount && blockIdx.x == 0) {
      for (int x = static_cast<int>(threadIdx.x); x <= segments; x += kRankThreads) out.offsets[x] = 0;
    }
  }
}

}  // namespace laprox::cuda
