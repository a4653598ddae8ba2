// What the kernels of a scan's beginning and end do together: numbers of tiles; partial sums to log-sum-exps, and how much the roots have to be
// multiplied by (formulas in scan.cuh). Reads a float a piece and row; a fixed order makes the bits repeat.
#pragma once

#include "cuda/kernels/blocks.cuh"
#include "cuda/kernels/exact_queries.cuh"
#include "cuda/kernels/scan.cuh"

namespace laprox::cuda {

// first_tile[x] = tiles before segment x, of the tokens that some row sees. By a whole block.
__device__ inline void number_seen_tiles(const ScanView& v) {
  const auto tiles = [&](int segment) {
    const Range range = v.ranges[segment];
    if (v.skips(v.g.layer[v.g.layer_of(segment)]) || range.end <= range.begin) return 0;
    return (range.end + kScanTile - 1) / kScanTile - range.begin / kScanTile;
  };
  number_all(v.g.segments, tiles, v.first_tile);
}

// What a scan leaves behind.
struct ScanResults {
  float* log_sums;         // [segments][R * m]
  float* inflation;        // [segments][R]
  float* exact_inflation;  // likewise
  PackedQueries packed;
};

// The end, of one head of the group: a block whose warps share the partial sums, a lane a row. Sums in a fixed order, in double. In a repair, of
// outgrown segments alone, partials are log-sum-exps.
inline constexpr int kFinishGroups = 4;

__device__ __noinline__ inline void finish_head(const ScanView& v, const ScanResults& to, int segment, int h, bool repair) {
  __shared__ double sums[kFinishGroups][32];
  const Geometry& g = v.g;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const LayerView& layer = g.layer[g.layer_of(segment)];
  const int begin = v.first_tile[segment];
  const int end = v.first_tile[segment + 1];
  const int first = begin < end ? worker_of(v, begin) : 0;
  const int last = begin < end ? worker_of(v, end - 1) + 1 : 0;  // pieces [first, last)
  const int64_t row0 = int64_t{h} * v.head_rows;
  float* const log_sums = to.log_sums + (int64_t{segment} * g.group + h) * g.rows;
  float most = 0;
  float most_exact = 0;  // where the log-sum-exps are the references
  bool nan = false;
  for (int q0 = 0; q0 < g.rows; q0 += 32) {
    const int q = q0 + lane;
    const float b = v.references[segment * int64_t{v.padded_rows} + row0 + q];
    const float* partials = v.partials + int64_t{segment} * v.padded_rows + row0 + q;
    float top = -INFINITY;
    if (layer.lse == nullptr && repair)
      for (int p = first; p < last; ++p) top = fmaxf(top, partials[int64_t{p} * v.padded_rows]);
    for (int group = warp; group < kFinishGroups; group += static_cast<int>(blockDim.x) / 32) {
      double total = 0;
      if (layer.lse == nullptr) {
        if (repair) {
          for (int p = first + group; p < last; p += kFinishGroups) {
            const float part = partials[int64_t{p} * v.padded_rows];
            if (part != -INFINITY) total += exp2(static_cast<double>(part) - top);
          }
        } else {
#pragma unroll 4
          for (int p = first + group; p < last; p += kFinishGroups) total += partials[int64_t{p} * v.padded_rows];
        }
      }
      sums[group][lane] = total;
    }
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
      log_sums[q] = lse;
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
  if (to.packed.image != nullptr) pack_log_sums(g, to.packed, segment, h, log_sums);
  if (warp != 0) return;
  for (int offset = 16; offset > 0; offset /= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    most_exact = fmaxf(most_exact, __shfl_xor_sync(0xffffffffu, most_exact, offset));
  }
  nan = __any_sync(0xffffffffu, nan);
  // Not 0: roots may be +inf.
  if (lane != 0) return;
  to.inflation[int64_t{segment} * g.group + h] = nan ? NAN : fmaxf(most, 1.5e-19f);
  to.exact_inflation[int64_t{segment} * g.group + h] = nan ? NAN : most_exact;
}

// The end of a repair: whatever block is the last does it for all.
__device__ inline void finish_repair(const ScanView& v, const ScanResults& to) {
  if (!last_to_arrive(v.g.arrivals + kRepaired, gridDim.x)) return;
  for (int segment = 0; segment < v.g.segments; ++segment)
    for (int h = 0; h < v.g.group && v.outgrown[segment] != 0; ++h) {
      finish_head(v, to, segment, h, true);
      __syncthreads();
    }
}

}  // namespace laprox::cuda
