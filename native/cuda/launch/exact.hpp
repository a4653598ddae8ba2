// The exact score of all tokens of a call, or of lists of them, by every rule that CUDA serves.
#pragma once

#include <cstdint>

#include "cuda/kernels/views.cuh"
#include "cuda/launch/factors.hpp"
#include "cuda/launch/launch.hpp"
#include "cuda/launch/path.hpp"
#include "laprox/laprox.h"

namespace laprox::cuda {

// Tokens to score, in any order, none twice.
struct Candidates {
  const int32_t* tokens;  // [segments][stride]
  const int32_t* counts;  // [segments]
};

class Exact {
 public:
  // Takes its part of the workspace. `factors` may be null for rules that project nothing. Throws UNSUPPORTED for rules without a kernel.
  Exact(Arena& arena, const Geometry& shape, lpx_dtype cache, lpx_dtype window, const lpx_score_rule& rule, const DeviceFactors* factors, Path path);

  // scores[segment * stride + token] for all tokens (only == null) or those of the lists; a score has the same bits either way.
  // log_sums [segments][R * m] in base 2; not read by rules that look at no query.
  void run(const Launch& launch, const Geometry& geometry, const float* log_sums, const Candidates* only, float* scores) const;

 private:
  void factored(const Launch& launch, const Geometry& geometry, const float* log_sums, const Candidates* only, float* scores) const;
  void joint(const Launch& launch, const Geometry& geometry, const float* log_sums, const Candidates* only, float* scores) const;
  void attention(const Launch& launch, const Geometry& geometry, const float* log_sums, const Candidates* only, bool weigh, float* scores) const;
  void pack_queries(const Launch& launch, const Geometry& geometry, int group, bool only_last, const float* log_sums) const;

  lpx_dtype cache_;
  lpx_dtype window_;
  lpx_score_rule rule_;
  const DeviceFactors* factors_;
  bool hopper_ = false;       // kernels for compute capability 9.0 serve this, where the device has it
  bool portable_ = false;     // kernels for any tensor cores do
  int32_t* tiles_ = nullptr;  // [segments + 1]
  char* queries_ = nullptr;   // packed for the fast kernels
  float* lse_ = nullptr;
};

}  // namespace laprox::cuda
