// A selection straight from a cache: few exact scores where bounds prove that the others cannot be kept (kernels/bound.cuh).
#pragma once

#include <memory>

#include "cuda/kernels/views.cuh"
#include "cuda/launch/attention.hpp"
#include "cuda/launch/exact.hpp"
#include "cuda/launch/factors.hpp"
#include "cuda/launch/launch.hpp"
#include "cuda/launch/path.hpp"
#include "cuda/launch/select.hpp"

namespace laprox::cuda {

// For tests; a selection does not depend on them.
struct PruningSizes {
  SelectSizes select;
  double worthwhile_candidates = 0.35;               // of all entries: with more, every score is computed
  double worthwhile_budget = 0.25;                   // likewise
  int64_t worthwhile_tightening = INT64_C(4) << 20;  // entries: of fewer, exact scores cost less than the launches that would spare some
};

// lpx_select_cache: attention, scores and selection, pruned where that can pay, all scores otherwise.
class Pruning {
 public:
  // `factors` is null for rules that need no projection; `rows` of the shape is 0 without a window.
  Pruning(Arena& arena, const Geometry& shape, lpx_dtype cache, lpx_dtype window, const lpx_score_rule& score_rule, const DeviceFactors* factors,
          const lpx_select_rule& select_rule, const Known& known, Path path, const PruningSizes& sizes = {});
  ~Pruning();

  // As Select::run. The same selection as from all scores, to the bit. `report` is device memory or null.
  void run(const Launch& launch, const Geometry& g, const lpx_selection& out, lpx_report* report) const;

 private:
  struct Bounds;

  ScoreView view(const Geometry& g) const;
  // All scores that a selection needs.
  void prune(const Launch& launch, const Geometry& g) const;

  PruningSizes sizes_;
  const char* obstacle_;  // why all scores are computed; null: they need not be
  int64_t row_bytes_ = 0;
  lpx_dtype cache_;
  double proving_;           // share of the budget that the first list has
  bool tightens_;            // bounds, if the path can
  float* scores_ = nullptr;  // [segments][stride]; negative: of an entry that has but a bound
  std::unique_ptr<Attention> attention_;
  std::unique_ptr<Exact> exact_;
  std::unique_ptr<Select> select_;
  const DeviceFactors* factors_;
  std::unique_ptr<Bounds> bounds_;  // what only the pruned path needs
};

}  // namespace laprox::cuda
