// The exact score of all tokens of a call, or of lists of them, by every rule that CUDA serves.
#pragma once

#include <cstdint>

#include "cuda/kernels/views.cuh"
#include "cuda/launch/attention.hpp"
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
  // Takes its part of the workspace. `factors` may be null for rules that project nothing, `attention` for those that look at no query. Throws
  // UNSUPPORTED for rules without a kernel.
  Exact(Arena& arena, const Geometry& shape, lpx_dtype cache, lpx_dtype window, const lpx_score_rule& rule, const DeviceFactors* factors,
        const Attention* attention, Path path);

  // What all runs share, once the attention has run.
  void prepare(const Launch& launch, const Geometry& geometry) const;
  // scores[segment * stride + token] for all tokens (only == null) or those of the lists; a score of a joint norm or its bound has the same bits
  // either way.
  void run(const Launch& launch, const Geometry& geometry, const Candidates* only, float* scores) const;

 private:
  void factored(const Launch& launch, const Geometry& geometry, const Candidates* only, float* scores) const;
  void joint(const Launch& launch, const Geometry& geometry, const Candidates* only, float* scores) const;
  void attention(const Launch& launch, const Geometry& geometry, const Candidates* only, bool weigh, float* scores) const;
  const float* log_sums() const { return attention_ == nullptr ? nullptr : attention_->log_sums(); }

  lpx_dtype cache_;
  lpx_dtype window_;
  lpx_score_rule rule_;
  const DeviceFactors* factors_;
  const Attention* attention_;
  bool hopper_ = false;       // kernels for compute capability 9.0 serve this
  bool portable_ = false;     // kernels for any tensor cores do
  int32_t* tiles_ = nullptr;  // [segments + 1]
  char* queries_ = nullptr;   // packed for the fast kernels, or null
  float* lse_ = nullptr;
};

}  // namespace laprox::cuda
