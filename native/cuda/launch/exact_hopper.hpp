// The tensor-core kernels of exact scores, a file of machine code each: they are many.
#pragma once

#include "cuda/kernels/exact_tiles.cuh"
#include "cuda/kernels/factors_layout.cuh"
#include "cuda/launch/launch.hpp"
#include "laprox/laprox.h"

namespace laprox::cuda {

struct JointArguments {
  Geometry geometry;
  const int32_t* tiles;  // [segments + 1]: tiles before each segment
  TokenLists lists;
  const char* queries;  // packed
  const float* lse;
  FactorView factors;
  bool bound;
  float* scores;
};

// Compute capability 9.0: whether there is a kernel, tokens of its tiles, and a run of it.
inline constexpr int kHopperTile = 192;
bool hopper_joint_serves(int group, int head_dim);
void hopper_joint(const Launch& launch, lpx_dtype dtype, const JointArguments& arguments);

}  // namespace laprox::cuda
