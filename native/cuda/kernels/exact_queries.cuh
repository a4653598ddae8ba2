// Window queries as the fast kernels stream them: slabs of some rows of every head, each a swizzled K-major tile (see
// factors_layout.cuh), with the log-sum-exp beside. Rows that do not exist are zero with a log-sum-exp of +inf: attention 0.
#pragma once

#include "cuda/kernels/factors_layout.cuh"
#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

// Window rows of each head in a slab.
LPX_BOTH constexpr int slab_rows(int group, int head_dim) {
  for (int rows = 32; rows > 8; rows /= 2)
    if (group * rows <= chunk_rows(head_dim)) return rows;
  return 8;
}
LPX_BOTH constexpr int slab_bytes(int group, int head_dim) { return chunk_bytes(group * slab_rows(group, head_dim), head_dim); }

// q.k with the layer's soft-cap, before the scale. tanh by a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
struct SoftCap {
  float inside;   // scale / cap
  float outside;  // cap / scale
  __device__ explicit SoftCap(const LayerView& layer) : inside(layer.scale / layer.soft_cap), outside(layer.soft_cap / layer.scale) {}

  __device__ float operator()(float product) const {
    const float x = product * inside;
    const float magnitude = fabsf(x);
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(power) : "f"(2.88539008177792681472f * magnitude));
    const float far = copysignf(1.0f - __fdividef(2.0f, power + 1.0f), x);
    const float z = x * x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return (magnitude < 0.625f ? p * z * x + x : far) * outside;
  }
};

// Where packed queries go.
struct PackedQueries {
  char* image;     // [segments][slabs][slab_bytes]; null: not wanted
  float* lse;      // [segments][slabs][group * slab_rows]
  bool only_last;  // all rows but the last of the window count as absent
};

inline constexpr int kPackThreads = 128;

// The queries of a segment.
__device__ inline void pack_segment(const Geometry& g, const PackedQueries& packed, int segment) {
  constexpr int kElement = 2;  // bytes
  const LayerView& layer = g.layer[g.layer_of(segment)];
  const int slab_height = slab_rows(g.group, g.head_dim);
  const int slabs = (g.rows + slab_height - 1) / slab_height;
  const int rows = g.group * slab_height;
  const int pieces = feature_panels(g.head_dim) * 8;
  const char* const queries = query_row(g, layer, g.sequence_of(segment), g.head_of(segment), 0, 0);
  const int first_position = g.row_position(segment, 0);
  char* to = packed.image + int64_t{segment} * slabs * slab_bytes(g.group, g.head_dim);
  for (int slab = 0; slab < slabs; ++slab, to += slab_bytes(g.group, g.head_dim)) {
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < rows * pieces; i += static_cast<int>(blockDim.x)) {
      const int row = i / pieces;
      const int feature = i % pieces * 8;
      const int q = slab * slab_height + row % slab_height;
      const char* const from = queries + row / slab_height * layer.query_head_stride + q * layer.query_row_stride + feature * kElement;
      const bool exists = q < g.rows && feature < g.head_dim && first_position + q >= 0;
      *reinterpret_cast<uint4*>(to + swizzled(rows, row, feature)) = exists ? *reinterpret_cast<const uint4*>(from) : uint4{};
    }
  }
}

// <<<segments, kPackThreads>>>, beside the kernel before it.
static __global__ void __launch_bounds__(kPackThreads)
    pack_queries(const __grid_constant__ Geometry g, const __grid_constant__ PackedQueries packed) {
  accompany_previous(true);
  if (*g.status == LPX_OK) pack_segment(g, packed, static_cast<int>(blockIdx.x));
  wait_for_previous();
}

// The log-sum-exps [m] of a head's queries, by a whole block.
__device__ inline void pack_log_sums(const Geometry& g, const PackedQueries& packed, int segment, int h, const float* log_sums) {
  const int slab_height = slab_rows(g.group, g.head_dim);
  const int slabs = (g.rows + slab_height - 1) / slab_height;
  for (int q = static_cast<int>(threadIdx.x); q < slabs * slab_height; q += static_cast<int>(blockDim.x)) {
    const int64_t slab = int64_t{segment} * slabs + q / slab_height;
    packed.lse[(slab * g.group + h) * slab_height + q % slab_height] = q < g.rows && (!packed.only_last || q == g.rows - 1) ? log_sums[q] : INFINITY;
  }
}

}  // namespace laprox::cuda
