// Which entries are kept, given scores: pooling, thresholds, tie quotas, and the kept tokens in ascending order.
//
// Scores become keys: unsigned integers in the order of the pooled scores, the largest key for entries that are kept outside
// the ranking. A sample tells which keys may reach the threshold, and histograms over the digits of these find it; nothing is
// sorted, and integer counts make the result independent of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "core/budget.hpp"
#include "cpu/pool.hpp"
#include "cpu/tile.hpp"
#include "cpu/workspace.hpp"

namespace laprox::cpu {

// The k-th largest key, and how many entries that have just this key are kept.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

float score_of(uint32_t key);

class Ranking {
 public:
  Ranking(Workspace& workspace, const ScoreLayout& layout, const lpx_select_rule& rule, const Kernels& kernels, int threads);

  enum class Absent { kNone, kMinusInfinity };

  // Pools `scores` (laid out as `layout` says), ranks, and finds the thresholds of all parts. Where absent entries are minus
  // infinity, they are no neighbours to pool and not counted as non-finite. Throws NON_FINITE or BUDGET_TOO_SMALL.
  void rank(Pool& pool, const std::vector<Part>& parts, const float* scores, Absent absent, Progress& progress);
  int64_t non_finite() const { return non_finite_; }

  // A score that no kept entry of this segment can be below, were any score of it to grow: the threshold of its part without
  // floors (which only raise it), or that of its own floor if lower. +inf where nothing is ranked.
  float lower_bound(size_t part, int64_t segment) const;

  void emit(Pool& pool, const std::vector<Part>& parts, const lpx_selection& out);

  // The k-th largest over a part of `values`, the bits of floats that are not below 0, laid out as the entries are; at most the largest
  // finite number.
  uint32_t kth_largest(Pool& pool, const Part& part, const uint32_t* values, int64_t k);

 private:
  // A run of tokens of one segment.
  struct Piece {
    int64_t segment;
    int64_t begin;
    int64_t end;
  };
  // Keys in a row, and where those that may reach a threshold are put.
  struct Run {
    const uint32_t* keys;
    int64_t count;
    uint32_t* picked;
  };
  std::vector<Piece> pieces(const std::vector<int64_t>& segments) const;
  std::vector<Run> runs(const std::vector<Piece>& list) const;
  uint32_t* keys(const Piece& piece) const { return keys_ + starts_[static_cast<size_t>(piece.segment)] + piece.begin; }
  void run(Pool& pool, int64_t count, const std::function<void(int64_t, int)>& task) const;
  void read(const Piece& piece, const float* scores, Absent absent, int worker, int64_t& non_finite, int64_t& forced);
  // By one worker, or by all where it is below 0.
  Threshold find(Pool& pool, const std::vector<Run>& runs, int64_t k, int worker);
  uint32_t guess(const std::vector<Run>& runs, int64_t size, int64_t k, int worker);
  static Threshold find_among_few(uint32_t* few, int64_t count, int64_t k);
  void take_floor(Pool& pool, int64_t segment, int64_t count, int worker);
  int64_t unprotected(const std::vector<Piece>& pieces) const;

  const ScoreLayout& layout_;
  const lpx_select_rule& rule_;
  const Kernels& kernels_;
  int threads_;
  std::vector<int64_t> starts_;  // [segments + 1] of keys
  uint32_t* keys_;
  uint32_t* picked_;
  uint32_t* histograms_;  // [threads][kCopies][kBins]
  float* pooling_;        // [threads][kPoolChunk + 2 * halo], in and out
  std::vector<Threshold> thresholds_;
  std::vector<float> lower_bounds_;      // [parts]
  std::vector<float> floor_thresholds_;  // [segments], or empty without floors
  int64_t non_finite_ = 0;
};

}  // namespace laprox::cpu
