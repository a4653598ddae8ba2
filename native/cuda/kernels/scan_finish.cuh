// What stands before and behind a scan: numbers of tiles; partial sums to log-sum-exps, and how much the roots have to be multiplied by
// (formulas in scan.cuh). Reads a float a piece and row; a fixed order makes the bits repeat.
#pragma once

#include "cuda/kernels/blocks.cuh"
#include "cuda/kernels/scan.cuh"

namespace laprox::cuda {

inline constexpr int kDealThreads = 1024;

// first_tile[x] = tiles before segment x: of the tokens that some row sees; where `whole`, of all, and ranges become that; where there are `counts`,
// of lists so long. One block.
__global__ void __launch_bounds__(kDealThreads) deal_tiles(ScanView v, bool whole, const int32_t* counts) {
  follow_previous();
  __shared__ int32_t scratch[32];
  if (*v.g.status != LPX_OK) return;
  int32_t before = 0;
  for (int first = 0; first < v.g.segments; first += kDealThreads) {
    const int segment = first + static_cast<int>(threadIdx.x);
    int32_t tiles = 0;
    if (segment < v.g.segments) {
      Range& range = v.ranges[segment];
      if (whole) {
        range.begin = 0;
        range.end = v.g.lengths[segment];
      }
      if (counts != nullptr)
        tiles = (counts[segment] + kScanTile - 1) / kScanTile;
      else if ((whole || !v.skips(v.g.layer[v.g.layer_of(segment)])) && range.end > range.begin)
        tiles = (range.end + kScanTile - 1) / kScanTile - range.begin / kScanTile;
    }
    int32_t total = 0;
    const int32_t own = block_prefix(tiles, scratch, total);
    if (segment < v.g.segments) v.first_tile[segment] = before + own;
    before += total;
  }
  if (threadIdx.x == 0) v.first_tile[v.g.segments] = before;
}

// The end: a block a (segment, head of the group), kFinishGroups warps that share the partial sums, a lane a row. Sums in a fixed order, in
// double. In a repair (`repair`), of the outgrown segments alone, partials are log-sum-exps.
inline constexpr int kFinishGroups = 8;

__global__ void __launch_bounds__(32 * kFinishGroups)
    finish_scan(ScanView v, float* log_sums, float* inflation, float* exact_inflation, bool repair) {
  follow_previous();
  __shared__ double sums[kFinishGroups][32];
  const Geometry& g = v.g;
  const int segment = blockIdx.x / g.group;
  const int h = blockIdx.x % g.group;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  if (*g.status != LPX_OK) return;
  if (repair && (v.outgrown[g.segments] == 0 || v.outgrown[segment] == 0)) return;
  const LayerView& layer = g.layer[g.layer_of(segment)];
  const int begin = v.first_tile[segment];
  const int end = v.first_tile[segment + 1];
  const int first = begin < end ? worker_of(v, begin) : 0;
  const int last = begin < end ? worker_of(v, end - 1) + 1 : 0;  // pieces [first, last)
  const int64_t row0 = int64_t{h} * v.head_rows;
  float most = 0;
  float most_exact = 0;  // where the log-sum-exps are the references
  bool nan = false;
  for (int q0 = 0; q0 < g.rows; q0 += 32) {
    const int q = q0 + lane;
    const float b = v.references[segment * int64_t{v.padded_rows} + row0 + q];
    const float* partials = v.partials + int64_t{segment} * v.padded_rows + row0 + q;
    double total = 0;
    float top = -INFINITY;
    if (layer.lse == nullptr) {
      if (repair) {
        for (int p = first; p < last; ++p) top = fmaxf(top, partials[int64_t{p} * v.padded_rows]);
        for (int p = first + warp; p < last; p += kFinishGroups) {
          const float part = partials[int64_t{p} * v.padded_rows];
          if (part != -INFINITY) total += exp2(static_cast<double>(part) - top);
        }
      } else {
#pragma unroll 4
        for (int p = first + warp; p < last; p += kFinishGroups) total += partials[int64_t{p} * v.padded_rows];
      }
    }
    sums[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && q < g.rows) {
      double sum = 0;
      for (int i = 0; i < kFinishGroups; ++i) sum += sums[i][lane];
      float lse = b;
      if (layer.lse == nullptr && b != INFINITY) {
        const double base = repair ? top : b;
        double log_sum = base + log2(sum);
        if (layer.sink_logits != nullptr) {
          const double sink = 1.44269504088896340736 * layer.sink_logits[g.head_of(segment) * g.group + h];
          const double larger = fmax(log_sum, sink);
          if (log_sum == log_sum) log_sum = larger + log2(exp2(log_sum - larger) + exp2(sink - larger));
        }
        lse = static_cast<float>(log_sum);
        if (!repair && !(sum < 3e38)) {
          v.outgrown[segment] = 1;
          v.outgrown[g.segments] = 1;
        }
      }
      log_sums[(int64_t{segment} * g.group + h) * g.rows + q] = lse;
      if (lse != INFINITY) {
        // References, bounds and scores are rounded in float, their logits by the tensor cores: a margin for what they are made of.
        const float margin = 5e-6f * (16 + fabsf(lse) + fabsf(b));
        most = fmaxf(most, exp2f(b - lse + margin));
        most_exact = fmaxf(most_exact, exp2f(1e-5f * (8 + fabsf(lse))));
        nan = nan || lse != lse;
      }
    }
    __syncthreads();
  }
  if (warp != 0) return;
  for (int offset = 16; offset > 0; offset /= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    most_exact = fmaxf(most_exact, __shfl_xor_sync(0xffffffffu, most_exact, offset));
  }
  nan = __any_sync(0xffffffffu, nan);
  // Not 0: roots may be +inf.
  if (lane != 0) return;
  inflation[int64_t{segment} * g.group + h] = nan ? NAN : fmaxf(most, 1.5e-19f);
  exact_inflation[int64_t{segment} * g.group + h] = nan ? NAN : most_exact;
}

}  // namespace laprox::cuda
