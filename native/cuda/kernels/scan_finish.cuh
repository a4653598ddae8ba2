// The end of a scan, and the numbers of tiles for one that statistics are taken of (kernels/scan_results.cuh).
#pragma once

#include "cuda/kernels/scan_results.cuh"

namespace laprox::cuda {

// A block a (segment, head of the group). `beside`: while the scan works, which finds no log-sum-exp.
__global__ void __launch_bounds__(32 * kFinishGroups)
    finish_scan(const __grid_constant__ ScanView v, const __grid_constant__ ScanResults to, bool beside) {
  accompany_previous(beside);
  const int head = static_cast<int>(blockIdx.x);
  if (*v.g.status == LPX_OK) finish_head(v, to, head / v.g.group, head % v.g.group, false);
  wait_for_previous();
}

inline constexpr int kNumberThreads = 1024;

// first_tile[x] = tiles before segment x, of all tokens; ranges become that. One block.
__global__ void __launch_bounds__(kNumberThreads) number_all_tiles(ScanView v) {
  follow_previous();
  if (*v.g.status != LPX_OK) return;
  const auto tiles = [&](int segment) {
    Range& range = v.ranges[segment];
    range.begin = 0;
    range.end = v.g.lengths[segment];
    return (range.end + kScanTile - 1) / kScanTile;
  };
  number_all(v.g.segments, tiles, v.first_tile);
}

}  // namespace laprox::cuda
