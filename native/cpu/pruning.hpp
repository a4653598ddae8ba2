// The pruned path: a selection that computes few exact scores.
//
//   U(g, i) = ||v_i|| * sum over h of s_h * bound(||a_h[:, i]||)  >=  score(g, i)
//
// The entries with the largest U are estimated, by the scores' formula with less accurate products of values: what a score is at least, and at
// most. Pooled and ranked, they prove a score that the threshold cannot be below. Entries whose U is below it cannot be kept, nor lift a
// neighbour by max-pooling to where it would be kept. The others are estimated, too. Where estimates leave open on which side of the threshold an
// entry is, its exact score decides, so that the selection is the same, to the bit, as if every score had been computed. Where scores are dear,
// because many query heads share an entry, U is tightened before by the exact attention of all pairs of heads.
#pragma once

#include <atomic>

#include "cpu/ranking.hpp"
#include "cpu/scoring.hpp"

namespace laprox::cpu {

class Pruning {
 public:
  Pruning(Workspace& workspace, const ScoreInputs& inputs, const ScoreLayout& layout, const lpx_select_rule& rule, const Kernels& kernels,
          int threads);

  void run(Pool& pool, const std::vector<Part>& parts, const lpx_selection& out, lpx_report& report, const lpx_call& call);

 private:
  using Cuts = std::vector<uint32_t>;  // a bound for each segment

  // Why bounds cannot be used or would not pay; null where they can.
  const char* obstacle(const std::vector<Part>& parts) const;
  // Whether all is known that matters, and whether the last ranking was of all of it.
  enum class Outcome { kUnproven, kScored, kRanked };
  Outcome prune(Pool& pool, const std::vector<Part>& parts, lpx_report& report, Progress& progress);
  void weigh_norms(int64_t segment, int32_t first, int count);
  void bound(int64_t segment, int32_t begin, int32_t end, const uint32_t* kept, Scratch& scratch);
  void pass_over_protected(int64_t segment, int halo);
  // Whether an exact score costs so much more than the attention that tightens a bound.
  bool tightens() const;
  // Calls body(token) for each of up to kCandidateBlock tokens from `begin` on whose bound is at least `least`.
  template <typename Body>
  void for_each_above(int64_t segment, int32_t begin, uint32_t least, Body&& body) const;
  // Calls body(segment, tokens, count, scratch) with the entries of each segment whose bound is at least `least`, but for those that are
  // done(segment, entry), kTile at a time. Returns how many.
  template <typename Done, typename Body>
  int64_t for_each_from(Pool& pool, const Cuts& least, Progress& progress, Done&& done, Body&& body);
  // Exact attention of all pairs of heads in place of the scan's bounds.
  int64_t tighten_from(Pool& pool, const Cuts& least, Progress& progress);
  // Estimates, or exact scores where there are no estimates.
  int64_t estimate_from(Pool& pool, const Cuts& least, Progress& progress);
  void estimate(int64_t segment, const int32_t* tokens, int count, float error, Scratch& scratch);
  void score(int64_t segment, const int32_t* tokens, int count, Scratch& scratch);
  // See Exact::estimate_error.
  float estimate_error(int64_t segment) const;
  // Of the ranked entries, those that may be on either side of their threshold get their exact scores. Returns whether the ranking is still right.
  bool settle(Pool& pool, const std::vector<Part>& parts, const Cuts& proven, Progress& progress);
  float weight(Segment s) const;

  const ScoreInputs& inputs_;
  const ScoreLayout& layout_;
  const lpx_select_rule& rule_;
  const Kernels& kernels_;
  Scoring scoring_;
  Ranking ranking_;
  float* scores_;    // [entries] what a score is at least; minus infinity where nothing is known
  float* ceilings_;  // [entries] what it is at most, where something is known: the same once it is exact
  float* norms_;     // [entries] of the values, weighted
  // [entries] the bits of U: it is not below 0, so they are in its order, and NaN is the largest.
  uint32_t* bounds_;
  bool* tight_;  // [entries] whose bound has been tightened
  std::atomic<int64_t> exact_scores_{0};
};

}  // namespace laprox::cpu
