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

inline constexpr int kPackThreads = 512;

// grid (segments, slabs). image [segments][slabs][slab_bytes], lse [segments][slabs][group * slab_rows]. only_last: all rows but the last of the
// window count as absent.
template <typename T>
__global__ void __launch_bounds__(kPackThreads) query_kernel(Geometry g, bool only_last, const float* log_sums, char* image, float* lse) {
  follow_previous();
  if (*g.status != LPX_OK) return;
  const int segment = static_cast<int>(blockIdx.x);
  const int slab = static_cast<int>(blockIdx.y);
  const LayerView& layer = g.layer[g.layer_of(segment)];
  const int slab_height = slab_rows(g.group, g.head_dim);
  const int rows = g.group * slab_height;
  const int pieces = feature_panels(g.head_dim) * 8;
  const int64_t tile = int64_t{segment} * gridDim.y + slab;
  char* to = image + tile * slab_bytes(g.group, g.head_dim);
  for (int i = static_cast<int>(threadIdx.x); i < rows * pieces; i += kPackThreads) {
    const int row = i / pieces;
    const int feature = i % pieces * 8;
    const int h = row / slab_height;
    const int q = slab * slab_height + row % slab_height;
    uint4 piece = {};
    if (q < g.rows && feature < g.head_dim && g.row_position(segment, q) >= 0)
      piece = *reinterpret_cast<const uint4*>(query_row(g, layer, g.sequence_of(segment), g.head_of(segment), h, q) + feature * sizeof(T));
    *reinterpret_cast<uint4*>(to + swizzled(rows, row, feature)) = piece;
    if (feature == 0) {
      const bool there = q < g.rows && (!only_last || q == g.rows - 1);
      lse[tile * rows + row] = there ? log_sums[int64_t{segment} * g.group * g.rows + h * g.rows + q] : INFINITY;
    }
  }
}

}  // namespace laprox::cuda
