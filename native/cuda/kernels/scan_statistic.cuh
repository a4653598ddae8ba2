// What a scan can tell where log-sum-exps are known, so that e is the attention itself.
#pragma once

#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

// What bounds of scores are made of beside attention.
struct BoundTerms {
  const float* singular;   // [layers][query heads]
  const float* inflation;  // [segments][R]
  const float* norms;      // [segments][stride]: ||v|| in layers whose cache keeps none
};

// Roots or bounds of listed tokens, or scores from a statistic of attention: of each head over the window's rows, aggregated over the heads of the
// group.
struct StatisticView {
  const float* log_sums;  // [segments][R * m]
  const int32_t* tokens;  // [segments][stride]: lists
  const int32_t* counts;  // [segments]
  BoundTerms bound;
  float* scores;  // [segments][stride]
  lpx_aggregation aggregation;
  bool mean;       // of the rows that exist
  bool only_last;  // of the window's rows
  bool weigh;      // by the layer's weight
  int32_t panel;

  // What an aggregate is multiplied by at last.
  __device__ float scale(const Geometry& g, int segment, float weight) const {
    float scale = weigh ? weight : 1.0f;
    if (mean) scale /= static_cast<float>(min(max(g.contexts[segment], 1), g.rows));
    if (aggregation == LPX_AGGREGATE_MEAN) scale /= static_cast<float>(g.group);
    return scale;
  }
};

}  // namespace laprox::cuda
