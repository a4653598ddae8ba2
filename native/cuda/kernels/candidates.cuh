// Lists of the entries whose exact scores are needed, by their upper bounds U.
//
//   rough   the largest, more than the budget: they get exact attention norms, which tighten their bounds
//   first   those that reach the cut: as many as the budget, pooled
//   loose   the others that reach what the first ones prove of the threshold, and are not tight: they get norms as well
//   second  what still reaches it then
//   rest    all others, where the candidates are too many to be worth it
//
// Reads U once a list (4 bytes an entry) and writes 4 bytes a listed entry. A warp takes a tile, counts, reserves its run of the
// segment's list with one atomic, and writes it in ascending order; only the order of the tiles in a list may differ between runs.
#pragma once

#include "cuda/kernels/blocks.cuh"
#include "cuda/kernels/select_views.cuh"

namespace laprox::cuda {

inline constexpr int kListThreadsOfTiles = 256;

enum class List { kRough, kFirst, kLoose, kSecond, kRest };

// What a pruned call counts. Zero at its start.
struct PruneCounts {
  unsigned long long candidates;
  unsigned long long exact;  // scores that were computed
  uint32_t blocks_done;
  uint32_t everything;  // the first list has all entries: the budget is large
  uint32_t rest;        // the third list is wanted
};

struct CandidateView {
  const int32_t* lengths;  // [segments]
  int64_t stride;
  int32_t segments;
  int32_t* status;
  const LayerView* layer;
  int32_t layer_segments;  // of a layer
  const int32_t* tile_start;
  const float* bounds;
  Parts parts;
  const uint32_t* cuts;        // [parts] keys: for kRough and kFirst of the bounds, for kLoose of the threshold
  const uint32_t* floor_cuts;  // [segments] keys or null
  float* first;                // [segments]: bounds from here on are in the first list
  float* second;               // [segments]: and from here on in the second
  int32_t* tokens;             // [segments][stride]
  int32_t* counts;             // [segments], zero before
  PruneCounts* total;
  double worthwhile_budget;
  double worthwhile_candidates;
};

template <List kList>
__global__ void __launch_bounds__(kListThreadsOfTiles) list_candidates(const __grid_constant__ CandidateView c) {
  if (*c.status != LPX_OK) return;
  if (kList == List::kRest && c.total->rest == 0) return;
  __shared__ int64_t scratch[32];
  __shared__ uint32_t finished;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const float none = absent_score();
  bool everything = false;
  if constexpr (kList == List::kFirst || kList == List::kRough) {
    int64_t quota = 0;
    int64_t entries = 0;
    for (int part = threadIdx.x; part < c.parts.count(); part += blockDim.x) {
      quota += c.parts.quota[part];
      entries += c.parts.entries[part];
    }
    quota = block_sum(quota, scratch);
    entries = block_sum(entries, scratch);
    everything = static_cast<double>(quota) > c.worthwhile_budget * static_cast<double>(entries);
    if (kList == List::kRough && everything) return;
    if (everything && blockIdx.x == 0 && threadIdx.x == 0) c.total->everything = 1;
  }
  const int64_t tiles = c.tile_start[c.segments];
  const int begin_tile = static_cast<int>(tiles * blockIdx.x / gridDim.x);
  const int end_tile = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x);
  unsigned long long candidates = 0;
  unsigned long long exact = 0;
  int segment = begin_tile < end_tile ? segment_of_tile(c.tile_start, c.segments, begin_tile) : 0;
  for (int tile = begin_tile + warp; tile < end_tile; tile += kListThreadsOfTiles / 32) {
    while (c.tile_start[segment + 1] <= tile) ++segment;
    const int length = c.lengths[segment];
    const int begin = (tile - c.tile_start[segment]) * kTile;
    float first = 0;
    float second = 0;
    // With a given log-sum-exp the scan's norms are exact.
    const bool improvable = c.layer[segment / c.layer_segments].lse == nullptr;
    if constexpr (kList == List::kRough || kList == List::kFirst || kList == List::kLoose) {
      float cut = score_of(c.cuts[c.parts.of(segment)]);
      if (kList != List::kRough && c.floor_cuts != nullptr) cut = fminf(cut, score_of(c.floor_cuts[segment]));
      if (everything) cut = none;
      if (kList == List::kRough && !improvable) continue;
      first = kList == List::kLoose ? c.first[segment] : cut;
      second = cut;
      if (kList == List::kFirst && begin == 0 && lane == 0) c.first[segment] = cut;
      if (kList == List::kLoose && begin == 0 && lane == 0) c.second[segment] = cut;
    } else {
      first = c.first[segment];
      second = c.second[segment];
    }
    // A word a lane: bit l of word w is token 128 * (w / 4) + 4 * l + w % 4.
    uint32_t word = 0;
    const float* own = c.bounds + segment * c.stride + begin;
#pragma unroll
    for (int chunk = 0; chunk < kTile / 128; ++chunk) {
      const int at = chunk * 128 + lane * 4;
      float4 v = {none, none, none, none};
      if (begin + at < length) v = __ldcs(reinterpret_cast<const float4*>(own + at));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float bound = j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
        const bool there = begin + at + j < length;
        // NaN reaches every cut.
        bool listed = false;
        if constexpr (kList == List::kFirst) listed = !(bound < first);
        if constexpr (kList == List::kRough) listed = !(bound < first) && (__float_as_uint(bound) & 1) == 0;
        if constexpr (kList == List::kLoose) listed = improvable && !(bound < second) && bound < first && (__float_as_uint(bound) & 1) == 0;
        if constexpr (kList == List::kSecond) listed = !(bound < second) && bound < first;
        if constexpr (kList == List::kRest) listed = bound < second && bound < first;
        if constexpr (kList == List::kLoose) candidates += there && !(bound < second);
        const uint32_t mine = __ballot_sync(~0u, there && listed);
        if (lane == chunk * 4 + j) word = mine;
      }
    }
    const int count = __reduce_add_sync(~0u, __popc(word));
    if (count == 0) continue;
    int base = 0;
    if (lane == 0) {
      base = atomicAdd(c.counts + segment, count);
      exact += count;
    }
    int32_t* to = c.tokens + segment * c.stride + __shfl_sync(~0u, base, 0);
    const uint32_t before_lane = (1u << lane) - 1;
#pragma unroll 1
    for (int chunk = 0; chunk < kTile / 128; ++chunk) {
      int slot = 0;
      int total = 0;
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = __shfl_sync(~0u, word, chunk * 4 + j);
        slot += __popc(words[j] & before_lane);
        total += __popc(words[j]);
      }
      if (total == 0) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (words[j] >> lane & 1) to[slot++] = begin + chunk * 128 + lane * 4 + j;
      to += total;
    }
  }
  const auto sum_of = [&](unsigned long long value) { return static_cast<unsigned long long>(block_sum(static_cast<int64_t>(value), scratch)); };
  if constexpr (kList != List::kRough && kList != List::kLoose) {
    exact = sum_of(exact);
    if (threadIdx.x == 0 && exact > 0) atomicAdd(&c.total->exact, exact);
  }
  if constexpr (kList == List::kLoose) {
    candidates = sum_of(candidates);
    if (threadIdx.x == 0) {
      if (candidates > 0) atomicAdd(&c.total->candidates, candidates);
      __threadfence();
      finished = atomicAdd(&c.total->blocks_done, 1u);
    }
    __syncthreads();
    if (finished + 1 != gridDim.x) return;
    int64_t entries = 0;
    for (int part = threadIdx.x; part < c.parts.count(); part += blockDim.x) entries += c.parts.entries[part];
    entries = block_sum(entries, scratch);
    if (threadIdx.x == 0) {
      __threadfence();
      const auto reached = static_cast<double>(atomicAdd(&c.total->candidates, 0ull));
      if (c.total->everything == 0 && reached > c.worthwhile_candidates * static_cast<double>(entries)) finished = ~0u;
    }
    __syncthreads();
    if (finished != ~0u) return;
    // Every score is computed: norms would not save any.
    for (int i = threadIdx.x; i < c.segments; i += blockDim.x) c.counts[i] = 0;
    if (threadIdx.x == 0) c.total->rest = 1;
  }
}

struct Text {
  char characters[64];
};

// What the report says beside what Select wrote.
__global__ void report_pruning(const int32_t* status, const PruneCounts* total, Text large_budget, Text obstacle, lpx_report* report) {
  if (*status != LPX_OK) return;
  const int64_t entries = report->entries;
  const bool full = total == nullptr || total->everything != 0 || total->rest != 0 || entries == 0;
  report->path = full ? LPX_PATH_FULL : LPX_PATH_PRUNED;
  report->candidates = full ? entries : static_cast<int64_t>(total->candidates);
  report->exact_scores = full ? entries : static_cast<int64_t>(total->exact);
  Text text{};
  if (total == nullptr) {
    text = obstacle;
  } else if (total->everything != 0) {
    text = large_budget;
  } else if (total->rest != 0) {
    const int percent = static_cast<int>(100.0 * static_cast<double>(total->candidates) / static_cast<double>(entries) + 0.5);
    const char* end = " % of the entries are candidates";
    char* to = text.characters;
    if (percent >= 100) *to++ = '1';
    if (percent >= 10) *to++ = static_cast<char>('0' + percent / 10 % 10);
    *to++ = static_cast<char>('0' + percent % 10);
    for (; *end != 0; ++end) *to++ = *end;
  }
  for (int i = 0; i < 64; ++i) report->fallback[i] = text.characters[i];
}

}  // namespace laprox::cuda
