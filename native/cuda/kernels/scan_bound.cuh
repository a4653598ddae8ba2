// The terms of an upper bound (kernels/bound.cuh has the formula).
#pragma once

#include <cfloat>

#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

inline constexpr float kBoundMargin = 1.001f;
inline constexpr float kVanishedBound = 1e-37f;

// What the root of a head's attention is multiplied by.
__device__ inline float bound_factor(const Geometry& g, const LayerView& layer, int segment, int head, const float* singular,
                                     const float* inflation) {
  return singular[(int64_t{g.layer_of(segment)} * g.kv_heads + g.head_of(segment)) * g.group + head] * layer.weight *
         inflation[int64_t{segment} * g.group + head];
}

// ||v|| of a token: kept with the cache, or in `norms`.
__device__ inline float value_norm(const Geometry& g, const LayerView& layer, int segment, const float* norms, int token) {
  if (layer.value_norm.data == nullptr) return norms[segment * g.stride + token];
  return *reinterpret_cast<const float*>(Rows(layer, layer.value_norm, g.sequence_of(segment), g.head_of(segment))(token));
}

__device__ inline float negated_bound(float norm, float sum) { return -fminf(norm * sum * kBoundMargin + kVanishedBound, FLT_MAX); }

}  // namespace laprox::cuda
