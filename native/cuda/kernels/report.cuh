// What a selection tells of how it came about.
#pragma once

#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

// What a pruned call counts. Zero at its start.
struct PruneCounts {
  unsigned long long candidates;  // in the first list or with a bound that reached the threshold, before it was tightened
  unsigned long long exact;       // scores that were computed
  uint32_t blocks_done;
  uint32_t everything;  // the first list has all entries: the budget is large
  uint32_t rest;        // all scores are computed: the candidates are too many for lists of them to be worth it
};

struct Text {
  char characters[sizeof(lpx_report::fallback)];
};

// How the scores of a selection came about.
struct ScoresReport {
  bool given;                 // none was computed
  const PruneCounts* counts;  // null: all were
  Text obstacle;              // why they were, where pruning was not tried
};

// By one thread.
__device__ inline void report_scores(const ScoresReport& from, int64_t entries, lpx_report& to) {
  const PruneCounts* const counts = from.counts;
  const bool large_budget = counts != nullptr && counts->everything != 0;
  const bool many = counts != nullptr && !large_budget && counts->rest != 0;
  const bool full = counts == nullptr || large_budget || many || entries == 0;
  to.path = full ? LPX_PATH_FULL : LPX_PATH_PRUNED;
  to.candidates = full ? entries : static_cast<int64_t>(counts->candidates);
  to.exact_scores = from.given ? 0 : full ? entries : static_cast<int64_t>(counts->exact);
  char* at = to.fallback;
  if (many) {
    const int percent = static_cast<int>(100.0 * static_cast<double>(counts->candidates) / static_cast<double>(entries) + 0.5);
    if (percent >= 100) *at++ = '1';
    if (percent >= 10) *at++ = static_cast<char>('0' + percent / 10 % 10);
    *at++ = static_cast<char>('0' + percent % 10);
  }
  const char* text = counts == nullptr ? from.obstacle.characters
                     : large_budget    ? "the budget is large"
                     : many            ? " % of the entries are candidates"
                                       : "";
#pragma unroll 1
  for (; *text != 0; ++text) *at++ = *text;
#pragma unroll 1
  while (at < to.fallback + sizeof to.fallback) *at++ = 0;
}

}  // namespace laprox::cuda
