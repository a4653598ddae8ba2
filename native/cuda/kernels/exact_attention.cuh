// Attention statistics of every token by warpgroup products (compute capability 9.0a): SnapKV's score and its relatives.
//
//   a_h[q] = 2^(q_h . k * scale - lse[h, q]);   s_h = sum, root of the sum of squares, or maximum over q;   score = aggregate of s_h
//
// Bytes: one read of K, one write of scores. Operations: 2 * d * R * m a token, and R * m exponentials: at R * m = 128 tensor cores and
// special functions each take about half of the time of the memory, so that all three must overlap.
//
// The packed queries of a segment (one or more slabs of up to 128 rows) stay in shared memory, as the right operand, while a CTA walks a run of
// neighbouring tiles. Each of its 16 warps has 16 tokens of a tile and a ring of its own for their keys, 16-byte copies from wherever pages or
// lists say, and takes them into registers as the left operand: no barrier between the copies and the products, nothing but the products
// themselves to wait for, so that copies, products and exponentials of the four warpgroups interleave by themselves. Sums over q stay in a
// thread but for the four lanes of a quad.
#pragma once

#include "cuda/kernels/exact_hopper.cuh"

namespace laprox::cuda {

struct AttentionRule {
  lpx_attention_statistic statistic;  // not NONE; LAST: as SUM, of queries packed so that the other rows have no attention
  lpx_aggregation aggregation;
  bool weigh;
};

template <int R, int D>
struct AttentionShape {
  static constexpr int kWarpgroups = 4;
  static constexpr int kThreads = kWarpgroups * 128;
  static constexpr int kTokens = kWarpgroups * 64;
  static constexpr int kRowBytes = chunk_bytes(16, D);  // of a warp's tokens
  static constexpr int kQueryRows = R * slab_rows(R, D);
  static constexpr int kSlabBytes = slab_bytes(R, D);
  // Queries, their log-sum-exp, keys, and room to align.
  static constexpr int64_t shared(int slabs, int stages) {
    return int64_t{slabs} * (kSlabBytes + kQueryRows * 4) + int64_t{kWarpgroups} * 4 * stages * kRowBytes + 1024;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// values[row][h] (+)= the statistic over the slab's rows that this lane holds.
template <bool Masked, lpx_attention_statistic Statistic, int D, int R>
__device__ __forceinline__ void add_statistic(const float (&sums)[64], const float2* lse, float scale, const Mask& mask, float (&values)[2][R]) {
  constexpr int kBlocks = slab_rows(R, D) / 8;
#pragma unroll
  for (int h = 0; h < R; ++h)
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const float2 reference = lse[(h * kBlocks + b) * 4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float a = exp2_fast(sums[(h * kBlocks + b) * 4 + e] * scale - (e % 2 == 0 ? reference.x : reference.y));
        if (Masked) a = mask.sees(e / 2, b * 8 + e % 2) ? a : 0.0f;
        float& value = values[e / 2][h];
        if (Statistic == LPX_ATTENTION_MAX)
          value = a > value || a != a ? a : value;
        else
          value += Statistic == LPX_ATTENTION_L2 ? a * a : a;
      }
    }
}

template <bool Masked, int D, int R>
__device__ __forceinline__ void add_statistic(lpx_attention_statistic statistic, const float (&sums)[64], const float2* lse, float scale,
                                              const Mask& mask, float (&values)[2][R]) {
  switch (statistic) {
    case LPX_ATTENTION_L2: return add_statistic<Masked, LPX_ATTENTION_L2, D>(sums, lse, scale, mask, values);
    case LPX_ATTENTION_MAX: return add_statistic<Masked, LPX_ATTENTION_MAX, D>(sums, lse, scale, mask, values);
    default: return add_statistic<Masked, LPX_ATTENTION_SUM, D>(sums, lse, scale, mask, values);
  }
}

#endif

// R: heads of the packed queries; g.group of them are real. stages: 2 or 3 key tiles a warp.
template <typename T, int R, int D>
__global__ void __launch_bounds__(AttentionShape<R, D>::kThreads, 1)
    attention_hopper_kernel(Geometry g, const int32_t* first_tiles, TokenLists lists, const char* queries, const float* lse, int stages,
                            AttentionRule rule, float* scores) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = AttentionShape<R, D>;
  extern __shared__ char attention_memory[];
  char* memory = attention_memory + (1024 - shared_address(attention_memory) % 1024) % 1024;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int slabs = (g.rows + slab_rows(R, D) - 1) / slab_rows(R, D);
  const uint32_t query_tiles = shared_address(memory);
  const uint32_t keys = query_tiles + slabs * Shape::kSlabBytes + warp * stages * Shape::kRowBytes;
  auto* references = reinterpret_cast<float*>(memory + slabs * Shape::kSlabBytes + Shape::kWarpgroups * 4 * stages * Shape::kRowBytes);
  const int64_t tiles = first_tiles[g.segments];
  const int begin = static_cast<int>(tiles * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x);

  int load_segment = 0;
  int load_stage = 0;
  const auto load = [&](int tile) {
    if (tile < end) {
      load_segment = segment_of_tile(first_tiles, g.segments, tile, load_segment);
      load_token_rows<D>(g, lists, load_segment, (tile - first_tiles[load_segment]) * Shape::kTokens + warp * 16, false,
                         keys + load_stage * Shape::kRowBytes);
    }
    commit_copies();
    load_stage = load_stage + 1 == stages ? 0 : load_stage + 1;
  };
  for (int i = 0; i < stages; ++i) load(begin + i);

  int segment = -1;
  int stage = 0;
  for (int tile = begin; tile < end; ++tile) {
    const int of_tile = segment_of_tile(first_tiles, g.segments, tile, max(segment, 0));
    if (of_tile != segment) {
      segment = of_tile;
      __syncthreads();
      const auto* from = reinterpret_cast<const uint4*>(queries + int64_t{segment} * slabs * Shape::kSlabBytes);
      for (int i = static_cast<int>(threadIdx.x); i < slabs * Shape::kSlabBytes / 16; i += Shape::kThreads)
        reinterpret_cast<uint4*>(memory)[i] = __ldg(from + i);
      for (int i = static_cast<int>(threadIdx.x); i < slabs * Shape::kQueryRows; i += Shape::kThreads)
        references[i] = __ldg(lse + int64_t{segment} * slabs * Shape::kQueryRows + i);
      fence_async_proxy();
      __syncthreads();
    }
    const LayerView& layer = g.layer[g.layer_of(segment)];
    const int count = lists.count(g, segment);
    const int first = (tile - first_tiles[segment]) * Shape::kTokens + warp * 16 + lane / 4;
    const int first_row_position = g.row_position(segment, 0);
    int token[2];
    Mask mask;
    mask.window = layer.sliding_window;
    bool hidden = false;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      token[row] = lists.token(g, segment, first + row * 8, count);
      mask.position[row] = token[row] < 0 ? 0 : token_position(layer, g.sequence_of(segment), g.head_of(segment), token[row]);
      hidden |= mask.position[row] > first_row_position || (mask.window != 0 && first_row_position + g.rows - 1 - mask.position[row] >= mask.window);
    }
    const bool masked = __any_sync(0xffffffffu, hidden);

    if (stages == 3)
      wait_copies<2>();
    else
      wait_copies<1>();
    uint32_t left[D / 16][4];
    load_left<D>(keys + stage * Shape::kRowBytes, left);
    load(tile + stages);
    float values[2][R] = {};
    for (int slab = 0; slab < slabs; ++slab) {
      float sums[64];
      const uint64_t right = wgmma_tile(query_tiles + slab * Shape::kSlabBytes);
      wgmma_fence();
      wgmma<T, Shape::kQueryRows, true>(sums, left[0], right);
#pragma unroll
      for (int step = 1; step < D / 16; ++step)
        wgmma<T, Shape::kQueryRows, false>(sums, left[step], right + ((step / 4 * Shape::kQueryRows * 128 + step % 4 * 32) >> 4));
      wgmma_commit();
      wgmma_wait();
      wgmma_settle<Shape::kQueryRows>(sums);
      if (layer.soft_cap > 0) {
        const SoftCap cap(layer);
#pragma unroll
        for (int i = 0; i < Shape::kQueryRows / 2; ++i) sums[i] = cap(sums[i]);
      }
      const auto* slab_lse = reinterpret_cast<const float2*>(references + slab * Shape::kQueryRows) + lane % 4;
      mask.row_position = first_row_position + slab * slab_rows(R, D) + lane % 4 * 2;
      const float scale = layer.scale * 1.44269504088896340736f;
      if (masked)
        add_statistic<true, D>(rule.statistic, sums, slab_lse, scale, mask, values);
      else
        add_statistic<false, D>(rule.statistic, sums, slab_lse, scale, mask, values);
    }
    stage = stage + 1 == stages ? 0 : stage + 1;

    const int existing = min(max(first_row_position + g.rows, 0), g.rows);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float score = 0;
#pragma unroll
      for (int h = 0; h < R; ++h) {
        if (h >= g.group) continue;
        float value = values[row][h];
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          const float other = __shfl_xor_sync(0xffffffffu, value, step);
          if (rule.statistic == LPX_ATTENTION_MAX)
            value = other > value || other != other ? other : value;
          else
            value += other;
        }
        if (rule.statistic == LPX_ATTENTION_L2) value = sqrtf(value);
        if (rule.statistic == LPX_ATTENTION_MEAN && existing > 0) value /= static_cast<float>(existing);
        if (rule.aggregation == LPX_AGGREGATE_MAX)
          score = h == 0 || value > score || value != value ? value : score;
        else
          score += rule.aggregation == LPX_AGGREGATE_RSS ? value * value : value;
      }
      if (rule.aggregation == LPX_AGGREGATE_RSS) score = sqrtf(score);
      if (rule.aggregation == LPX_AGGREGATE_MEAN) score /= static_cast<float>(g.group);
      if (rule.weigh) score *= layer.weight;
      if (lane % 4 == 0 && token[row] >= 0) scores[segment * g.stride + token[row]] = score;
    }
  }
#endif
}

}  // namespace laprox::cuda
