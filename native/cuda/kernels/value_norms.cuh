// ||v||_2 of every row: out[row] = sqrt(sum over k of v[k]^2).
//
// Bytes: one read of V, 4 a row written. 8, 16 or 32 neighbouring lanes share a row, 16 bytes each, and every thread asks for pieces of 8 rows
// before it needs the first: 32 KiB of 256 threads are under way, several times that of a processor.
#pragma once

#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

inline constexpr int kRowBatch = 8;      // rows of a thread under way
inline constexpr int kNormTokens = 512;  // of a CTA of 256 threads

// Lanes that share a row of `bytes`.
inline int row_lanes(int64_t bytes) { return bytes <= 128 ? 8 : bytes <= 256 ? 16 : 32; }

// sums[i] of rows from[i] (null: 0): of squares, or of magnitudes, in all lanes of a row.
template <typename T, int Lanes>
__device__ inline void row_sums(const char* const (&from)[kRowBatch], int bytes, bool magnitudes, float (&sums)[kRowBatch]) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  const int lane = static_cast<int>(threadIdx.x) % Lanes;
#pragma unroll
  for (int i = 0; i < kRowBatch; ++i) sums[i] = 0;
  for (int at = lane * 16; at < bytes; at += Lanes * 16) {
    uint4 raw[kRowBatch];
#pragma unroll
    for (int i = 0; i < kRowBatch; ++i) {
      raw[i] = {};
      if (from[i] != nullptr) raw[i] = __ldcs(reinterpret_cast<const uint4*>(from[i] + at));
    }
#pragma unroll
    for (int i = 0; i < kRowBatch; ++i) {
      const T* x = reinterpret_cast<const T*>(&raw[i]);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) sums[i] += magnitudes ? fabsf(to_float(x[k])) : to_float(x[k]) * to_float(x[k]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRowBatch; ++i)
#pragma unroll
    for (int step = Lanes / 2; step > 0; step /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], step);
}

// grid (tiles of kNormTokens, segments).
template <typename T, int Lanes>
__global__ void __launch_bounds__(256) value_norm_kernel(Geometry g) {
  if (*g.status != LPX_OK) return;
  constexpr int kGroups = 256 / Lanes;
  const int group = static_cast<int>(threadIdx.x) / Lanes;
  const int bytes = g.head_dim * static_cast<int>(sizeof(T));
  const int first = static_cast<int>(blockIdx.x) * kNormTokens;
  for (int segment = static_cast<int>(blockIdx.y); segment < g.segments; segment += static_cast<int>(gridDim.y)) {
    const LayerView& layer = g.layer[g.layer_of(segment)];
    const int length = g.lengths[segment];
    if (layer.value_norm.data == nullptr || first >= length) continue;
    const Rows rows(layer, layer.value, g.sequence_of(segment), g.head_of(segment));
    const Rows norms(layer, layer.value_norm, g.sequence_of(segment), g.head_of(segment));
    for (int base = 0; base < kNormTokens; base += kGroups * kRowBatch) {
      const char* from[kRowBatch];
      float sums[kRowBatch];
#pragma unroll
      for (int i = 0; i < kRowBatch; ++i) {
        const int token = first + base + i * kGroups + group;
        from[i] = token < length ? rows(token) : nullptr;
      }
      row_sums<T, Lanes>(from, bytes, false, sums);
#pragma unroll
      for (int i = 0; i < kRowBatch; ++i)
        if (threadIdx.x % Lanes == 0 && from[i] != nullptr)
          *reinterpret_cast<float*>(const_cast<char*>(norms(first + base + i * kGroups + group))) = sqrtf(sums[i]);
    }
  }
}

}  // namespace laprox::cuda
