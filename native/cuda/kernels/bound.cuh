// Upper bounds of scores:
//
//   U(g, i) = ||v_i|| * weight * sum over h of s_h * inflation_h * roots_h(i)  >=  score(g, i)
//
// s_h bounds the singular values of W_h; roots and inflation come from the scan (kernels/scan.cuh). Grown by a part in a thousand, which is what
// rounding may take. U is written as the score -U: a score that is not negative is exact, and what is negative ranks behind all that are. A bound
// that is not finite becomes the largest float.
//
// Bytes an entry: 2 R of roots, 4 of a norm, 4 for the score. Layout: a warp has runs of 128 tokens, a lane two pairs of neighbours in each: up to
// 16 bytes of roots a load.
#pragma once

#include "cuda/kernels/scan.cuh"
#include "cuda/kernels/scan_bound.cuh"
#include "cuda/kernels/select_views.cuh"

namespace laprox::cuda {

inline constexpr int kBoundThreads = 256;
inline constexpr int kBoundBlocks = 4;  // a multiprocessor
inline constexpr int kMaxBoundGroup = 64;

struct BoundView {
  Geometry g;
  const int32_t* tile_start;
  const __nv_bfloat16* roots;  // [segments][panels][stride][heads of a panel]
  int32_t panels;
  const Range* ranges;     // [segments]: tokens outside are not seen, and have no roots
  const float* inflation;  // [segments][R]
  const float* singular;   // [layers][query heads]
  const float* norms;      // [segments][stride]: of layers whose cache keeps none
  float* scores;           // [segments][stride]
  uint32_t* zeros;         // what is to be zero behind this kernel
  int32_t zero_words;
};

// Norms of two tokens from `token` on, of which `there` exist.
__device__ inline float2 kept_norms(const Rows& rows, int token, int there) {
  if (there <= 0) return {0, 0};
  const char* first = rows(token);
  const bool together = rows.token_stride == 4 && (rows.table == nullptr || rows.page_size % 2 == 0) && reinterpret_cast<uint64_t>(first) % 8 == 0;
  if (together && there >= 2) return __ldcs(reinterpret_cast<const float2*>(first));
  return {*reinterpret_cast<const float*>(first), there >= 2 ? *reinterpret_cast<const float*>(rows(token + 1)) : 0.0f};
}

// Heads: of a panel.
template <int Heads>
__global__ void __launch_bounds__(kBoundThreads, kBoundBlocks) find_bounds(const __grid_constant__ BoundView b) {
  follow_previous();
  if (*b.g.status != LPX_OK) return;
  for (int i = blockIdx.x * kBoundThreads + threadIdx.x; i < b.zero_words; i += gridDim.x * kBoundThreads) b.zeros[i] = 0;
  __shared__ float factors[kBoundThreads / 32][kMaxBoundGroup];
  const Geometry& g = b.g;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int tiles = b.tile_start[g.segments];
  const int begin_tile = static_cast<int>(int64_t{tiles} * blockIdx.x / gridDim.x);
  const int end_tile = static_cast<int>(int64_t{tiles} * (blockIdx.x + 1) / gridDim.x);
  if (begin_tile >= end_tile) return;
  int segment = segment_of_tile_together(b.tile_start, g.segments, begin_tile);
  int known = -1;  // the segment of `factor`
  float* factor = factors[warp];
  for (int tile = begin_tile + warp; tile < end_tile; tile += kBoundThreads / 32) {
    while (b.tile_start[segment + 1] <= tile) ++segment;
    const int length = g.lengths[segment];
    const int head = g.head_of(segment);
    const int layer_index = g.layer_of(segment);
    const LayerView& layer = g.layer[layer_index];
    if (known != segment) {
      __syncwarp();
      for (int h = lane; h < g.group; h += 32) factor[h] = bound_factor(g, layer, segment, h, b.singular, b.inflation);
      __syncwarp();
      known = segment;
    }
    const bool kept = layer.value_norm.data != nullptr;
    const Rows rows(layer, layer.value_norm, g.sequence_of(segment), head);
    const Range range = b.ranges[segment];
    const int begin = (tile - b.tile_start[segment]) * kTile;
    const int end = min(begin + kTile, length);
    constexpr int kSteps = 2;  // of 64 tokens, under way at once
    for (int step = begin; step < end; step += kSteps * 64) {
      float2 norm[kSteps];
      float2 sum[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int token = step + i * 64 + lane * 2;
        sum[i] = {0, 0};
        norm[i] = {0, 0};
        if (token >= length) continue;
        norm[i] = kept ? kept_norms(rows, token, length - token) : __ldcs(reinterpret_cast<const float2*>(b.norms + segment * g.stride + token));
      }
      for (int panel = 0; panel < b.panels; ++panel) {
        const uint32_t* from = reinterpret_cast<const uint32_t*>(b.roots + (int64_t{segment} * b.panels + panel) * g.stride * Heads);
        uint32_t words[kSteps][Heads];  // of two tokens
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const int token = step + i * 64 + lane * 2;
          const uint32_t* pair = from + int64_t{token} / 2 * Heads;
          const bool there = token < length;
          if constexpr (Heads == 4) {
            const uint4 all = there ? __ldcs(reinterpret_cast<const uint4*>(pair)) : make_uint4(0, 0, 0, 0);
            words[i][0] = all.x;
            words[i][1] = all.y;
            words[i][2] = all.z;
            words[i][3] = all.w;
          } else {
#pragma unroll
            for (int w = 0; w < Heads; ++w) words[i][w] = there ? __ldcs(pair + w) : 0;
          }
        }
#pragma unroll
        for (int h = 0; h < Heads; ++h) {
          if (panel * Heads + h >= g.group) continue;
          const float of_head = factor[panel * Heads + h];
          const auto root_at = [&](int i, int element) {
            return __uint_as_float(element % 2 == 0 ? words[i][element / 2] << 16 : words[i][element / 2] & 0xffff0000u);
          };
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
            sum[i].x += of_head * root_at(i, h);
            sum[i].y += of_head * root_at(i, Heads + h);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int token = step + i * 64 + lane * 2;
        if (token >= length) continue;
        const auto score = [&](float norm, float sum, int token) {
          const bool seen = token >= range.begin && token < range.end;
          return negated_bound(norm, seen ? sum : 0.0f);
        };
        *reinterpret_cast<float2*>(b.scores + segment * g.stride + token) = {score(norm[i].x, sum[i].x, token),
                                                                             score(norm[i].y, sum[i].y, token + 1)};
      }
    }
  }
}

// Tightens the bounds of listed tokens, whose roots are those of exact attention. Blocks of kBoundThreads in x, segments in y.
__global__ void __launch_bounds__(kBoundThreads)
    tighten_bounds(const __grid_constant__ BoundView b, const int32_t* tokens, const int32_t* counts, int heads) {
  follow_previous();
  if (*b.g.status != LPX_OK) return;
  const Geometry& g = b.g;
  for (int segment = static_cast<int>(blockIdx.y); segment < g.segments; segment += static_cast<int>(gridDim.y)) {
    const int count = counts[segment];
    const LayerView& layer = g.layer[g.layer_of(segment)];
    const Range range = b.ranges[segment];
    for (int i = static_cast<int>(blockIdx.x) * kBoundThreads + static_cast<int>(threadIdx.x); i < count;
         i += static_cast<int>(gridDim.x) * kBoundThreads) {
      const int token = tokens[segment * g.stride + i];
      if (token < range.begin || token >= range.end) continue;  // not seen: there is no root, and the bound is as tight as can be
      float sum = 0;
      for (int h = 0; h < g.group; ++h) {
        const __nv_bfloat16* roots = b.roots + (int64_t{segment} * b.panels + h / heads) * g.stride * heads;
        sum += bound_factor(g, layer, segment, h, b.singular, b.inflation) * to_float(roots[int64_t{token} * heads + h % heads]);
      }
      float& score = b.scores[segment * g.stride + token];
      score = fmaxf(negated_bound(value_norm(g, layer, segment, b.norms, token), sum), score);
    }
  }
}

}  // namespace laprox::cuda
