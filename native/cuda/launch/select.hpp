// Which entries are kept, given scores on the device: budgets, thresholds and the kept tokens, equal to native/cpu/ranking.cpp.
#pragma once

#include <vector>

#include "cuda/kernels/select_views.cuh"
#include "cuda/launch/launch.hpp"

namespace laprox::cuda {

struct RankView;
struct ScoresReport;
struct SelectionView;

// Sizes of buffers, for tests to shrink: a selection does not depend on them.
struct SelectSizes {
  int32_t slots = 128;                          // listed candidates of a tile of 1024 tokens
  int64_t histogram_bytes = INT64_C(32) << 20;  // more parts than fit get smaller histograms, and more passes
  int64_t sampled = 8192;                       // keys above the threshold that a sample has: parts with more are sampled
  double deviations = 12;                       // of a sample: neighbouring keys are alike, so 4 standard deviations of 9 times the variance
};

class Select {
 public:
  // Of `shape` only the sizes and the presence of `layer` count. The rule is copied.
  // `lists`: takes what `select` alone needs, as large as the scores, from memory that may serve others before it; null: from `arena`.
  Select(Arena& arena, const ScoreView& shape, const lpx_select_rule& rule, const SelectSizes& sizes = {}, Arena* lists = nullptr);

  // `out` and `report` are device memory (`report` may be null; its size and its seconds are left alone). On a status that is not LPX_OK, set
  // before or here (BUDGET_TOO_SMALL, NON_FINITE, OUT_OF_BOUNDS for a capacity that is too small), nothing is selected: all offsets are 0.
  void run(const Launch& launch, const ScoreView& scores, const lpx_selection& out, lpx_report* report) const;

  // The steps of it, for the pruned path. Protected tokens, quotas and tiles, from lengths. `beside`: the kernel before leads (kernels/views.cuh).
  void find_budgets(const Launch& launch, const ScoreView& scores, bool beside) const;
  // Remembers a search: to be zero again before each of the next three but the first after find_budgets.
  uint32_t* zeros() const { return zeros_; }
  int64_t zero_words() const { return zero_words_; }
  // Ranks and emits. `ranged`: lower_bounds has looked at some of the scores, so that it is known about where a threshold is. `how` the scores came
  // about, for the report.
  void select(const Launch& launch, const ScoreView& scores, bool ranged, const lpx_selection& out, lpx_report* report,
              const ScoresReport& how) const;
  // Of negated upper bounds: `cuts()` become values that about `share` of each part's quota of them reach, pooled, a few more rather than
  // fewer; `floor_cuts()` become what floors may take of each segment.
  void cut_bounds(const Launch& launch, const ScoreView& bounds, double share) const;
  // `cuts()` become values that no kept entry of a part can be below, were any negative score of `scores` to grow; `floor_cuts()`
  // the same for floors of segments (null: none): the lower of the two holds for a segment.
  void lower_bounds(const Launch& launch, const ScoreView& scores) const;

  const Parts& parts() const { return parts_; }
  const int32_t* tile_start() const { return tile_start_; }                            // [segments + 1]
  const uint32_t* cuts() const { return ranks_.low; }                                  // [parts] keys
  const uint32_t* floor_cuts() const { return floors() ? head_ranks_.low : nullptr; }  // [segments] keys
  const lpx_select_rule& rule() const { return rule_; }
  int64_t max_tiles() const { return max_tiles_; }

 private:
  bool floors() const { return rule_.floor > 0; }
  struct Plan;
  RankView view(const ScoreView& scores) const;
  void run(const Launch& launch, const RankView& view, const Plan& plan, const SelectionView& out, lpx_report* report, const ScoresReport& how) const;
  // Passes over ranges that one of `first_bits_` leaves.
  int passes_left() const { return static_cast<int>(ceil_div(32 - first_bits_, bits_)); }

  lpx_select_rule rule_;
  SelectSizes sizes_;
  std::vector<PositionRange> ranges_;  // sinks and pinned positions, merged
  int64_t segments_ = 0;
  int64_t max_tiles_ = 0;
  int first_bits_ = 0;  // of the histogram of whole keys
  int bits_ = 0;        // of those of ranges
  bool sample_ = false;
  Parts parts_{};
  Parts heads_{};  // every segment for itself
  Ranks ranks_{};
  Ranks head_ranks_{};
  Collected collected_{};
  PositionRange* device_ranges_ = nullptr;
  int32_t* bounds_ = nullptr;
  int32_t* tile_start_ = nullptr;
  // Zero between passes.
  uint32_t* zeros_ = nullptr;
  int64_t zero_words_ = 0;
  uint32_t* histogram_ = nullptr;
  int64_t histogram_words_ = 0;
  unsigned long long* granted_ = nullptr;
  // Of the tiles and segments.
  int32_t* tile_above_ = nullptr;
  int32_t* tile_ties_ = nullptr;
  int32_t* tile_segment_ = nullptr;
  int32_t* segment_above_ = nullptr;
  int32_t* segment_ties_ = nullptr;
  int32_t* tie_quota_ = nullptr;
  uint32_t* blocks_done_ = nullptr;
};

}  // namespace laprox::cuda
