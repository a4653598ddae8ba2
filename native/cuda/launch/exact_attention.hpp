// Attention statistics by warpgroup products: compute capability 9.0.
#pragma once

#include "cuda/kernels/exact_tiles.cuh"
#include "cuda/launch/launch.hpp"
#include "laprox/laprox.h"

namespace laprox::cuda {

struct AttentionArguments {
  Geometry geometry;
  int32_t* tiles;  // [segments + 1], overwritten
  TokenLists lists;
  const char* queries;  // packed for attention_group(R) heads
  const float* lse;
  lpx_attention_statistic statistic;
  lpx_aggregation aggregation;
  bool weigh;
  float* scores;
};

// Heads that the queries are packed for: the kernel of 1, 2, 4 or 8 heads.
inline int attention_group(int group) { return group <= 2 ? group : group <= 4 ? 4 : 8; }
bool hopper_attention_serves(int group, int head_dim, int rows);
void hopper_attention(const Launch& launch, lpx_dtype dtype, const AttentionArguments& arguments);

}  // namespace laprox::cuda
