// The full path: every exact score of a cache.
#pragma once

#include <optional>
#include <vector>

#include "cpu/attention.hpp"
#include "cpu/exact.hpp"

namespace laprox::cpu {

// Tokens of one task of exact scores.
inline constexpr int kScoreBlock = 128;

class Scoring {
 public:
  // `observed`: find_attention() may have an observer.
  Scoring(Workspace& workspace, const ScoreInputs& inputs, const Kernels& kernels, int threads, bool observed = false);

  // Units of progress of run().
  int64_t work() const { return (1 + kExactWork) * inputs_.cache.entries(); }
  void run(Pool& pool, const ScoreLayout& layout, float* data, Progress& progress);

  // The parts of run(), for the pruned path.
  void find_attention(Pool& pool, Progress& progress, const Observer* observer);
  void score_all(Pool& pool, const ScoreLayout& layout, float* data, Progress& progress);
  const Attention& attention() const { return *attention_; }
  const Exact& exact() const { return exact_; }
  Scratch& scratch(int worker) { return scratch_[static_cast<size_t>(worker)]; }

 private:
  static constexpr int64_t kExactWork = 4;  // an exact score costs about as much as that many entries of a scan

  void share(Pool& pool, const ScoreLayout& layout, float* data);
  template <typename Body>
  void for_each_tile(Pool& pool, Progress& progress, Body&& body);

  const ScoreInputs& inputs_;
  std::vector<Scratch> scratch_;
  std::optional<Attention> attention_;
  Exact exact_;
};

}  // namespace laprox::cpu
