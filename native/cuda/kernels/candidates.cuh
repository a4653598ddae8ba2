// Lists of the entries whose exact scores are needed, by their upper bounds U: scores that are negative are -U (kernels/bound.cuh).
//
//   first   those that reach the cut of the bounds: more than the budget, pooled
//   loose   the others that reach what the first ones prove of the threshold: their bounds can be tightened
//   second  what still reaches it then
//
// Where the candidates turn out to be too many, `rest` says so, and the tiles behind the second list are those of all tokens.
//
// Reads a score an entry and writes 4 bytes a listed entry. A warp takes a tile, lists its tokens in shared memory, reserves its run of the
// segment's list with one atomic, and writes it in ascending order, all lanes side by side; only the order of the tiles in a list may differ between
// runs. Consecutive tiles go to different blocks, since what is listed lies together. The last block numbers the tiles of those who take the list.
#pragma once

#include "cuda/kernels/blocks.cuh"
#include "cuda/kernels/report.cuh"
#include "cuda/kernels/select_views.cuh"

namespace laprox::cuda {

inline constexpr int kListThreadsOfTiles = 256;
inline constexpr int kListBlocks = 6;  // a multiprocessor

enum class List { kFirst, kLoose, kSecond };

struct CandidateView {
  const int32_t* lengths;  // [segments]
  int64_t stride;
  int32_t segments;
  int32_t* status;
  const int32_t* tile_start;
  const float* scores;
  Parts parts;
  const uint32_t* cuts;        // [parts] keys: of the bounds for the first list, of the threshold for the others
  const uint32_t* floor_cuts;  // [segments] keys or null
  int32_t* tokens;             // [segments][stride]
  int32_t* counts;             // [segments]; zero before
  int32_t* first_tiles;        // [segments + 1]: tiles of `tile` listed tokens before each segment
  int32_t tile;
  PruneCounts* total;
  bool tightens;    // there is a loose list
  uint32_t* zeros;  // what is to be zero behind the first and the second list
  int64_t zero_words;
  double worthwhile_budget;
  double worthwhile_candidates;
};

template <List kList>
__global__ void __launch_bounds__(kListThreadsOfTiles, kListBlocks) list_candidates(const __grid_constant__ CandidateView c) {
  follow_previous();
  if (*c.status != LPX_OK) return;
  const bool rest = kList == List::kSecond && c.tightens && c.total->rest != 0;
  const bool counts_candidates = kList == List::kFirst || c.tightens == (kList == List::kLoose);
  constexpr int kWarps = kListThreadsOfTiles / 32;
  __shared__ int64_t scratch[32];
  __shared__ uint16_t token_lists[kWarps][kTile];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  uint16_t* const list = token_lists[warp];
  bool everything = false;
  if constexpr (kList == List::kFirst) {
    int64_t quota = c.parts.quota[0];
    int64_t entries = c.parts.entries[0];
    if (c.parts.count() > 1) {
      quota = entries = 0;
      for (int part = threadIdx.x; part < c.parts.count(); part += blockDim.x) {
        quota += c.parts.quota[part];
        entries += c.parts.entries[part];
      }
      quota = block_sum(quota, scratch);
      entries = block_sum(entries, scratch);
    }
    everything = static_cast<double>(quota) > c.worthwhile_budget * static_cast<double>(entries);
    if (everything && blockIdx.x == 0 && threadIdx.x == 0) c.total->everything = 1;
  }
  if (kList == List::kFirst || kList == List::kSecond)
    for (int64_t i = blockIdx.x * kListThreadsOfTiles + threadIdx.x; i < c.zero_words; i += gridDim.x * kListThreadsOfTiles) c.zeros[i] = 0;
  const int tiles = rest ? 0 : c.tile_start[c.segments];
  unsigned long long candidates = 0;
  for (int tile = warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x); tile < tiles; tile += kWarps * static_cast<int>(gridDim.x)) {
    const int segment = segment_of_tile_together(c.tile_start, c.segments, tile);
    const int length = c.lengths[segment];
    const int begin = (tile - c.tile_start[segment]) * kTile;
    float cut = score_of(c.cuts[c.parts.of(segment)]);
    if (c.floor_cuts != nullptr) cut = fminf(cut, score_of(c.floor_cuts[segment]));
    if (everything) cut = absent_score();
    const float* own = c.scores + segment * c.stride + begin;
    float4 all[kTile / kRun];
#pragma unroll
    for (int run = 0; run < kTile / kRun; ++run) {
      const int at = run * kRun + lane * 4;
      all[run] = {0, 0, 0, 0};
      if (begin + at < length) all[run] = __ldcs(reinterpret_cast<const float4*>(own + at));
    }
    uint32_t listed = 0;
#pragma unroll
    for (int i = 0; i < kTile / kRun * 4; ++i) {
      const float score = component(all[i / 4], i % 4);
      if (score < 0 && score <= -cut) listed |= 1u << i;
    }
    if (!__any_sync(~0u, listed != 0)) continue;
    const int count = list_tokens(gathered(listed, lane) & mask_of(lane, 0, length - begin), lane, list);
    int base = 0;
    if (lane == 0) {
      base = atomicAdd(c.counts + segment, count);
      candidates += static_cast<unsigned long long>(count);
    }
    int32_t* const to = c.tokens + segment * c.stride + __shfl_sync(~0u, base, 0);
    for (int i = lane; i < count; i += 32) to[i] = begin + list[i];
  }
  candidates = static_cast<unsigned long long>(block_sum(static_cast<int64_t>(candidates), scratch));
  if (threadIdx.x == 0 && candidates > 0) {
    if (kList != List::kLoose) atomicAdd(&c.total->exact, candidates);
    if (counts_candidates) atomicAdd(&c.total->candidates, candidates);
  }
  if (!last_to_arrive(&c.total->blocks_done, gridDim.x)) return;
  bool too_many = rest;
  if (kList != List::kFirst && counts_candidates) {
    int64_t entries = 0;
    for (int part = threadIdx.x; part < c.parts.count(); part += blockDim.x) entries += c.parts.entries[part];
    entries = block_sum(entries, scratch);
    const auto all = static_cast<double>(__ldcg(&c.total->candidates));
    too_many = c.total->everything == 0 && all > c.worthwhile_candidates * static_cast<double>(entries);
  }
  // Where all scores are computed no bound need be tight.
  const auto listed = [&](int segment) { return !too_many ? __ldcg(c.counts + segment) : kList == List::kLoose ? 0 : c.lengths[segment]; };
  number_all(c.segments, [&](int i) { return (listed(i) + c.tile - 1) / c.tile; }, c.first_tiles);
  __syncthreads();
  if (kList == List::kLoose && too_many)
    for (int i = threadIdx.x; i < c.segments; i += blockDim.x) c.counts[i] = 0;
  if (threadIdx.x != 0) return;
  c.total->blocks_done = 0;
  if (too_many) c.total->rest = 1;
}

}  // namespace laprox::cuda
