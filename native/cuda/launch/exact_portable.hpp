// Scores by mma.sync: any chip from compute capability 8.0.
#pragma once

#include "cuda/kernels/exact_portable.cuh"
#include "cuda/launch/launch.hpp"
#include "laprox/laprox.h"

namespace laprox::cuda {

struct PortableArguments {
  Geometry geometry;
  const int32_t* tiles;  // [segments + 1]: tiles before each segment
  TokenLists lists;
  const char* queries;  // packed for the heads there are
  const float* lse;
  FactorView factors;
  PortableRule rule;
  float* scores;
};

bool portable_serves(int group, int head_dim);
// Tokens of its tiles, on the current device.
int portable_tile(int group, int head_dim);
void portable_scores(const Launch& launch, lpx_dtype dtype, const PortableArguments& arguments);

}  // namespace laprox::cuda
