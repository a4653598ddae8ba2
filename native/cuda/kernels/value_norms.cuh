// ||v||_2 of every row: out[row] = sqrt(sum over k of v[k]^2).
//
// Bytes: one read of V, 4 a row written. 8, 16 or 32 neighbouring lanes share a row, 16 bytes each, and every thread asks for kRowBatch pieces
// before it needs the first: with 24 warps a processor 96 KiB are under way, of some 50 that the memory needs to be busy, so that half of the
// time may go to sums. These cost a shuffle a row: an exchange that halves the rows of a lane with every step leaves it the whole of its own.
#pragma once

#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

inline constexpr int kRowBatch = 8;       // rows of a thread under way
inline constexpr int kNormTokens = 1024;  // of a CTA of 256 threads

// Lanes that share a row of `bytes`.
inline int row_lanes(int64_t bytes) { return bytes <= 128 ? 8 : bytes <= 256 ? 16 : 32; }

// The row of the batch whose sum a lane ends with, and whether it is the first of the lanes that do.
template <int Lanes>
__device__ inline int owned_row(int lane) {
  return lane % Lanes / (Lanes / kRowBatch);
}
template <int Lanes>
__device__ inline bool owns_row(int lane) {
  return lane % (Lanes / kRowBatch) == 0;
}

// The sum of v[owned_row] over the lanes of a row.
template <int Lanes, int Half = kRowBatch / 2, int Step = Lanes / 2>
__device__ inline float sum_of_owned(float (&v)[kRowBatch], int lane) {
  if constexpr (Half > 0) {
    const bool upper = (lane & Step) != 0;
#pragma unroll
    for (int i = 0; i < Half; ++i) {
      const float given = upper ? v[i] : v[Half + i];
      v[i] = (upper ? v[Half + i] : v[i]) + __shfl_xor_sync(0xffffffffu, given, Step);
    }
    return sum_of_owned<Lanes, Half / 2, Step / 2>(v, lane);
  } else {
    float sum = v[0];
#pragma unroll
    for (int step = Step; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
  }
}

// Of rows row_at(i), where they begin (null: 0): the sum of squares, or of magnitudes, of row `owned_row`.
template <typename T, int Lanes, typename RowAt>
__device__ inline float row_sum(RowAt row_at, int bytes, bool magnitudes) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sums[kRowBatch] = {};
  for (int at = lane % Lanes * 16; at - lane % Lanes * 16 < bytes; at += Lanes * 16) {
    uint4 raw[kRowBatch];
#pragma unroll
    for (int i = 0; i < kRowBatch; ++i) {
      const char* from = row_at(i);
      raw[i] = {};
      if (from != nullptr && at < bytes) raw[i] = __ldcs(reinterpret_cast<const uint4*>(from + at));
    }
#pragma unroll
    for (int i = 0; i < kRowBatch; ++i) {
      const T* x = reinterpret_cast<const T*>(&raw[i]);
#pragma unroll
      for (int k = 0; k < kPiece; ++k) sums[i] += magnitudes ? fabsf(to_float(x[k])) : to_float(x[k]) * to_float(x[k]);
    }
  }
  return sum_of_owned<Lanes>(sums, lane);
}

// grid (tiles of kNormTokens, segments). Into the caches' own planes, of layers that have one; or into norms [segments][stride], of the others.
template <typename T, int Lanes>
__global__ void __launch_bounds__(256, 3) value_norm_kernel(const __grid_constant__ Geometry g, float* norms) {
  follow_previous();
  if (*g.status != LPX_OK) return;
  constexpr int kRows = 32 / Lanes;  // of a warp at a time
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int bytes = g.head_dim * static_cast<int>(sizeof(T));
  const int begin = static_cast<int>(blockIdx.x) * kNormTokens;
  for (int segment = static_cast<int>(blockIdx.y); segment < g.segments; segment += static_cast<int>(gridDim.y)) {
    const LayerView& layer = g.layer[g.layer_of(segment)];
    const int length = g.lengths[segment];
    const int end = min(begin + kNormTokens, length);
    if ((layer.value_norm.data == nullptr) != (norms != nullptr)) continue;
    const Rows rows(layer, layer.value, g.sequence_of(segment), g.head_of(segment));
    const Rows planes(layer, layer.value_norm, g.sequence_of(segment), g.head_of(segment));
    constexpr int kTokens = kRows * kRowBatch;
    for (int first = begin + static_cast<int>(threadIdx.x) / 32 * kTokens; first < end; first += 256 / 32 * kTokens) {
      const auto token_of = [&](int i) { return first + i * kRows + lane / Lanes; };
      float sum;
      if (rows.table == nullptr || rows.page_size % kTokens == 0) {  // in one page
        const char* base = rows(first) + lane / Lanes * rows.token_stride;
        const int64_t step = kRows * rows.token_stride;
        sum = row_sum<T, Lanes>([&](int i) { return token_of(i) < end ? base + i * step : nullptr; }, bytes, false);
      } else {
        sum = row_sum<T, Lanes>([&](int i) { return token_of(i) < end ? rows(token_of(i)) : nullptr; }, bytes, false);
      }
      const int token = token_of(owned_row<Lanes>(lane));
      if (!owns_row<Lanes>(lane) || token >= end) continue;
      if (norms != nullptr)
        norms[segment * g.stride + token] = sqrtf(sum);
      else
        *reinterpret_cast<float*>(const_cast<char*>(planes(token))) = sqrtf(sum);
    }
  }
}

}  // namespace laprox::cuda
