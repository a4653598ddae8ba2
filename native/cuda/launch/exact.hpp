// The exact score of all tokens of a call, or of lists of them, by every rule that CUDA serves.
#pragma once

#include <cstdint>

#include "cuda/kernels/exact_queries.cuh"
#include "cuda/kernels/views.cuh"
#include "cuda/launch/attention.hpp"
#include "cuda/launch/factors.hpp"
#include "cuda/launch/launch.hpp"
#include "cuda/launch/path.hpp"
#include "laprox/laprox.h"

namespace laprox::cuda {

// Tokens to score, in any order, none twice.
struct Candidates {
  const int32_t* tokens;       // [segments][stride]
  const int32_t* counts;       // [segments]
  const int32_t* first_tiles;  // [segments + 1]: tiles of Exact::tile() tokens before each segment
  const uint32_t* all_after;   // not 0 once the kernel runs: all tokens after all, in as many tiles; or null
};

class Exact {
 public:
  // Takes its part of the workspace. `factors` may be null for rules that project nothing, `attention` for those that look at no query. Throws
  // UNSUPPORTED for rules without a kernel.
  Exact(Arena& arena, const Geometry& shape, lpx_dtype cache, lpx_dtype window, const lpx_score_rule& rule, const DeviceFactors* factors,
        const Attention* attention, Path path);

  // The queries as the kernels want them, packed while the kernel before works, which is the attention's sample.
  void pack(const Launch& launch, const Geometry& geometry) const;
  // Where the attention's log-sum-exps go, too; nothing where the image is null.
  const PackedQueries& packed() const { return packed_; }
  // Tokens of a tile of listed ones.
  int tile() const { return tile_; }
  // scores[segment * stride + token] for all tokens (only == null) or, of joint norms and their bounds, those of the lists: with the same bits. After
  // the attention has run.
  void run(const Launch& launch, const Geometry& geometry, const Candidates* only, float* scores) const;

 private:
  void factored(const Launch& launch, const Geometry& geometry, float* scores) const;
  void joint(const Launch& launch, const Geometry& geometry, const Candidates* only, float* scores) const;
  void attention(const Launch& launch, const Geometry& geometry, bool weigh, float* scores) const;
  const float* log_sums() const { return attention_ == nullptr ? nullptr : attention_->log_sums(); }

  lpx_dtype cache_;
  lpx_dtype window_;
  lpx_score_rule rule_;
  const DeviceFactors* factors_;
  const Attention* attention_;
  bool hopper_ = false;    // kernels for compute capability 9.0 serve this
  bool portable_ = false;  // kernels for any tensor cores do
  int tile_ = 0;
  int32_t* tiles_ = nullptr;  // [segments + 1]
  PackedQueries packed_{};
};

}  // namespace laprox::cuda
