// The search for the key that a budget ends at, in every part, by passes over the scores.
//
//   T = the k-th largest key of a part
//
//   find_range   a sample of pooled keys -> counts in 8192 bins -> a range of keys that holds T, but for bad luck
//   collect      all scores: a bit for every key above the range; for those in it a list a tile and counts in 2048 bins. Whether
//                the range held T is known then; where it did not, both run again, without sampling
//   refine       the lists -> the exact T and how many of its ties are kept
//
// Bytes: one read of the scores and a sixteenth of another; a bit a score for what lies above T's range, 8 bytes for each entry in it.
// A list that is too short (ties, narrow distributions) is not used: the tile's keys are computed again from its scores.
//
// A block walks consecutive tiles and keeps its counts in shared memory until the part changes. Counts are integers, so nothing
// depends on the order of blocks.
//
// Most of this runs once in a block, so that its instructions come from memory each time: what all passes do is written once, and loops that
// do not wait for memory stay loops.
#pragma once

#include "cuda/kernels/blocks.cuh"
#include "cuda/kernels/pooled_keys.cuh"

namespace laprox::cuda {

inline constexpr int kRankThreads = 512;
inline constexpr int kRankWarps = kRankThreads / 32;
inline constexpr int kMaxRangeBits = 22;  // of a sampled range: what two passes of 2048 bins take apart
inline constexpr int kMostBits = 13;      // of a histogram
inline constexpr uint32_t kRoom = 3;      // bins that a threshold may rise by

// A block's shared memory: a stage for each warp, then a histogram of the size of the largest pass.
__device__ inline float* stages() {
  extern __shared__ __align__(16) float memory[];
  return memory;
}
__device__ inline float* stage_of(int warp) { return stages() + warp * kStage; }
__device__ inline uint32_t* shared_histogram() { return reinterpret_cast<uint32_t*>(stages() + kRankWarps * kStage); }

// A block's share of the tiles: [first, end). All passes of a kernel have the same.
struct Share {
  int first;
  int end;
  int segment;  // of the first
};

// Tiles of one part, and the keys that are looked at.
struct Run {
  int part;
  int first;  // tiles [first, end)
  int end;
  int segment;  // of the first
  uint32_t low;
  uint32_t last;
  int shift;
};

// The low bits of a key that do not count for its bin, in a range of keys.
__device__ inline int shift_of(uint32_t low, uint32_t last, int bits) { return max(32 - __clz(last - low) - bits, 0); }

__device__ inline uint32_t floor_key_of(const RankView& p, const Pass& pass, int segment) {
  return pass.floored ? p.search[kOfHeads].ranks.key[segment] : kForced - 1;
}

__device__ inline void add_broken(const Ranks& ranks, int part, uint32_t non_finite, uint32_t forced, int lane) {
  if (!__any_sync(~0u, non_finite != 0)) return;
  non_finite = __reduce_add_sync(~0u, non_finite);
  forced = __reduce_add_sync(~0u, forced);
  if (lane != 0) return;
  atomicAdd(ranks.non_finite + part, non_finite);
  atomicAdd(ranks.forced + part, forced);
}

// How many keys a search looks for.
__device__ inline int64_t goal_of(const RankView& p, const Pass& pass, int part) {
  const Ranks& ranks = p.search[pass.search].ranks;
  switch (pass.goal) {
    case Goal::kSample:
    case Goal::kSampleLow: return p.parts().quota[part] - p.parts().guarded[part];
    case Goal::kExact:
    case Goal::kBudget:
    case Goal::kProve: return p.parts().quota[part] - p.parts().guarded[part] - __ldcg(ranks.forced + part);
    case Goal::kTarget: return ranks.target[part];
    case Goal::kFloor: {
      const auto target = static_cast<double>(p.search[kOfRule].ranks.target[p.parts().of(part)]);
      return static_cast<int64_t>(floor(__ddiv_rn(__dmul_rn(pass.share, target), static_cast<double>(p.parts().segments_each()))));
    }
    case Goal::kRest: return ranks.target[part] - static_cast<int64_t>(p.granted[part]);
    case Goal::kShare: return static_cast<int64_t>(ceil(__dmul_rn(pass.share, static_cast<double>(p.parts().quota[part]))));
    case Goal::kFloorShare: {
      const int outer = p.parts().of(part);
      const auto target = static_cast<double>(p.parts().quota[outer] - p.parts().guarded[outer]);
      auto goal = static_cast<int64_t>(floor(__ddiv_rn(__dmul_rn(pass.share, target), static_cast<double>(p.parts().segments_each()))));
      const int32_t* bounds = p.protection.of(part);
      goal += p.scores.length(part) - bounds[0];
#pragma unroll 1
      for (int r = 0; r < p.protection.ranges; ++r) goal += max(min(bounds[2 + 2 * r], bounds[0]) - bounds[1 + 2 * r], 0);
      return goal;
    }
    case Goal::kContinue: return ranks.left[part];
  }
  return 0;
}

__device__ inline void set_range(const Ranks& ranks, int part, uint32_t low, uint32_t last, uint32_t key, int64_t left, int64_t ties) {
  ranks.low[part] = low;
  ranks.last[part] = last;
  ranks.key[part] = key;
  ranks.left[part] = left;
  ranks.ties[part] = ties;
}

__device__ inline void fail_part(const Ranks& ranks, int part) {
  ranks.failed[part] = 1;
  atomicAdd(ranks.failures, 1u);
  set_range(ranks, part, kForced, kForced, kForced - 1, 0, 0);
}

// Ends a pass over a part: finds the bin that the key it looks for lies in, narrows the range to it, and clears the histogram.
// By a whole block; `shared` holds a histogram. All that it loads is asked for at once: the others wait for this one block.
__device__ inline void pick(const RankView& p, const Pass& pass, int part, uint32_t low, uint32_t last) {
  const Ranks& ranks = p.search[pass.search].ranks;
  uint32_t* const shared = shared_histogram();
  __shared__ int64_t scratch[32];
  const int bins = 1 << pass.bits;
  const int shift = shift_of(low, last, pass.bits);
  const bool sampled = pass.ranges();
  int64_t goal = goal_of(p, pass, part);
  const int stride = pass.stride(ranks, part);
  const int64_t all = sampled ? p.parts().entries[part] - (pass.goal == Goal::kShare ? 0 : p.parts().guarded[part]) : 0;  // keys of the part
  const int64_t above_range = pass.goal == Goal::kBudget || pass.goal == Goal::kProve ? __ldcg(ranks.above + part) : 0;
  uint4* histogram = reinterpret_cast<uint4*>(ranks.histogram + (int64_t{part} << pass.bits));
  constexpr int kHeld = (1 << kMostBits) / 4 / kRankThreads;
  uint4 held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = i * kRankThreads + static_cast<int>(threadIdx.x);
    if (at < bins / 4) held[i] = __ldcg(histogram + at);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = i * kRankThreads + static_cast<int>(threadIdx.x);
    if (at >= bins / 4) continue;
    reinterpret_cast<uint4*>(shared)[at] = held[i];
    histogram[at] = {0, 0, 0, 0};
  }
  __shared__ int64_t reached[2];  // bins that ranks are found in, and
  __shared__ int64_t beyond[2];   // keys above them
  __syncthreads();
  // From the top. The bins of a thread are neighbours; threads begin with different ones, so with different banks.
  const int each = max(bins / kRankThreads, 1);  // a power of two
  const int top = bins - 1 - static_cast<int>(threadIdx.x) * each;
  uint32_t own = 0;  // a part has fewer than 2^32 keys
  if (top >= 0)
    for (int i = 0; i < each; ++i) own += shared[top - ((i + static_cast<int>(threadIdx.x)) & (each - 1))];
  const auto [before, total] = block_prefix(own, scratch);
  if (pass.goal == Goal::kFloor || pass.goal == Goal::kFloorShare) goal = min(goal, int64_t{total});
  int64_t ranks_wanted[2] = {goal, goal};
  bool everything = false;
  if (sampled) {
    // A sample of `total` of the part's keys.
    if (stride > 1) {
      const float share = all > 0 ? static_cast<float>(goal) / static_cast<float>(all) : 0;
      const float middle = share * static_cast<float>(total);
      const float margin = p.deviations * sqrtf(middle * (1 - fminf(share, 1))) + 16;
      ranks_wanted[0] = max(static_cast<int64_t>(middle - margin), int64_t{1});
      ranks_wanted[1] = static_cast<int64_t>(middle + margin) + 1;
    } else {
      goal -= pass.goal == Goal::kShare ? 0 : all - total;  // the keys that are missing were not finite
      ranks_wanted[0] = ranks_wanted[1] = min(max(goal, int64_t{1}), int64_t{total});
    }
    everything = ranks_wanted[1] > int64_t{total};
  }
  if (pass.goal == Goal::kBudget) ranks_wanted[0] = goal - above_range;
  if (threadIdx.x < 2) reached[threadIdx.x] = -1;
  __syncthreads();
#pragma unroll 1
  for (int w = 0; w < 2; ++w) {
    const int64_t wanted = ranks_wanted[w];
    if (!(wanted > before && wanted <= before + own)) continue;
    int64_t above = before;
    int bin = top;
#pragma unroll 1
    for (; above + shared[bin] < wanted; --bin) above += shared[bin];
    reached[w] = bin;
    beyond[w] = above;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;

  const auto edge = [&](int64_t bin) { return low + (static_cast<uint32_t>(bin) << shift); };
  const uint32_t width = (1u << shift) - 1;
  if (sampled) {
    if (goal <= 0) {  // nothing is ranked: no key is in the range
      set_range(ranks, part, kForced, kForced, kForced - 1, 0, 0);
    } else if (pass.goal == Goal::kShare) {
      ranks.low[part] = everything || reached[1] < 0 ? 0 : edge(reached[1]);
    } else {
      const uint32_t from = everything || reached[1] < 0 ? 0 : edge(reached[1]);
      const uint32_t until = reached[0] < 0 ? kForced - 1 : edge(reached[0]) + width;
      constexpr uint32_t kMaxRange = (1u << kMaxRangeBits) - 1;
      if (pass.goal == Goal::kSampleLow)
        set_range(ranks, part, from, from + min(until - from + min(kRoom << shift, kForced - 1 - until), kMaxRange), kForced - 1, 0, 0);
      else if (until - from > kMaxRange)
        fail_part(ranks, part);
      else
        set_range(ranks, part, from, until, kForced - 1, 0, 0);
    }
    return;
  }
  if (pass.goal == Goal::kExact || pass.goal == Goal::kBudget || pass.goal == Goal::kProve) {
    if (p.refuse_non_finite && __ldcg(ranks.non_finite + part) > 0) report_status(p.scores.status, LPX_NON_FINITE);
    if (goal < 0) report_status(p.scores.status, LPX_BUDGET_TOO_SMALL);
    ranks.target[part] = max(goal, int64_t{0});
  }
  if (pass.goal == Goal::kFloor && goal > 0) atomicAdd(p.granted + p.parts().of(part), static_cast<unsigned long long>(goal));
  if (goal <= 0) {  // above every key that is ranked
    set_range(ranks, part, kForced, kForced, kForced - 1, 0, 0);
  } else if (pass.goal == Goal::kProve) {
    if (above_range + __ldcg(ranks.inside + part) < goal) ranks.low[part] = 0;
  } else if (pass.goal == Goal::kBudget && ranks.failed[part] != 0) {
    return;
  } else if (reached[0] >= 0) {
    const uint32_t from = edge(reached[0]);
    const int64_t left = ranks_wanted[0] - beyond[0];
    set_range(ranks, part, from, from + width, from, left, left);
  } else if (pass.goal == Goal::kBudget) {
    fail_part(ranks, part);
  } else {  // fewer keys than that: all of them
    set_range(ranks, part, 0, 0, 0, goal, 0);
  }
}

// Tells the part that tiles of it are counted. The last block to do so ends the pass for it.
__device__ inline void finish_run(const RankView& p, const Pass& pass, const Run& run) {
  __shared__ uint32_t finished;
  const uint32_t* const histogram = shared_histogram();
  const Search& search = p.search[pass.search];
  __syncthreads();
  uint32_t* const all = search.ranks.histogram + (int64_t{run.part} << pass.bits);
#pragma unroll 1
  for (int i = threadIdx.x; i < 1 << pass.bits; i += kRankThreads)
    if (histogram[i] != 0) atomicAdd(all + i, histogram[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto own = static_cast<uint32_t>(run.end - run.first);
    finished = atomicAdd(search.ranks.done + int64_t{pass.index} * search.parts.count() + run.part, own) + own;
  }
  __syncthreads();
  if (finished != static_cast<uint32_t>(search.parts.tiles[run.part])) return;
  __threadfence();
  pick(p, pass, run.part, run.low, run.last);
}

// What a floor took of just its own key is not ranked again. In the segment's first tile.
__device__ inline void subtract_floor(const RankView& p, int segment, uint32_t low, uint32_t last, int shift, uint32_t* histogram) {
  const Ranks& floors = p.search[kOfHeads].ranks;
  const uint32_t key = floors.key[segment];
  if (key >= low && key <= last && floors.ties[segment] > 0)
    atomicAdd(histogram + ((key - low) >> shift), 0u - static_cast<uint32_t>(floors.ties[segment]));
}

// Counts keys; of a part's range where one is known, of a sample of the part where it is large.
template <int kHalo>  // -1: any
__device__ inline void find_range(const RankView& p, const Pass& pass, const Run& run) {
  const Ranks& ranks = p.search[pass.search].ranks;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float* const stage = stage_of(warp);
  uint32_t* const histogram = shared_histogram();
  const auto [part, tile, end, first_segment, low, last, shift] = run;
  const int stride = pass.stride(ranks, part);
  const bool whole = pass.first() && !pass.floored;  // every key that is ranked
  int segment = first_segment;
  uint32_t non_finite = 0;
  uint32_t forced = 0;
  const int runs = (end - tile) * kRuns;
#pragma unroll 1
  for (int group = warp; group * stride < runs; group += kRankWarps) {
    int index = group * stride;
    if (stride > 1) {  // one of the group, by a hash of where it is
      uint32_t hash = static_cast<uint32_t>(tile * kRuns + index) * 0x9e3779b1u;
      hash ^= hash >> 15;
      hash *= 0x85ebca77u;
      index += static_cast<int>((hash >> 16) & static_cast<uint32_t>(stride - 1));
      if (index >= runs) continue;
    }
    const int own = tile + index / kRuns;
#pragma unroll 1
    while (p.tile_start[segment + 1] <= own) ++segment;
    const Source source(p.scores, segment);
    const int begin = (own - p.tile_start[segment]) * kTile + index % kRuns * kRun;
    if (begin == 0 && lane == 0 && pass.floored) subtract_floor(p, segment, low, last, shift, histogram);
    if (begin >= source.length) continue;
    const auto load = [&](int token) {
      const float4 v = source.load4(token, absent_score());
      return p.bounds ? make_float4(fabsf(v.x), fabsf(v.y), fabsf(v.z), fabsf(v.w)) : v;  // what is not there is infinite either way
    };
    const float4 v = load(begin + lane * 4);
    const RunProtection guarded(p.protection, segment, begin, begin + kRun);
    float4 pooled;
    if constexpr (kHalo < 0) {
      pooled = pool_through_stage(source.own, source.length, p.pool, p.bounds, begin, lane, stage);
    } else if constexpr (kHalo == 0) {
      pooled = {cleaned(v.x), cleaned(v.y), cleaned(v.z), cleaned(v.w)};
    } else {
      float4 beside = {absent_score(), absent_score(), absent_score(), absent_score()};
      if (lane == 0) beside = load(begin - 4);
      if (lane == 31) beside = load(begin + kRun);
      const float own_run[4] = {cleaned(v.x), cleaned(v.y), cleaned(v.z), cleaned(v.w)};
      const float edge[4] = {cleaned(beside.x), cleaned(beside.y), cleaned(beside.z), cleaned(beside.w)};
      pooled = pool_by_shuffles<kHalo>(own_run, edge, lane);
    }
    const bool clean = finite(v.x) && finite(v.y) && finite(v.z) && finite(v.w);
    if (whole && !guarded.any && begin + kRun <= source.length && __all_sync(~0u, clean)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) atomicAdd(histogram + (key_of(component(pooled, i)) >> shift), 1u);
      continue;
    }
    const Keys keys = make_keys(p, v, pooled, source, guarded, begin, lane);
    if (pass.count) count_broken(keys, guarded, begin + lane * 4, non_finite, forced);
    const uint32_t floor_key = floor_key_of(p, pass, segment);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = keys.key[i];
      if ((keys.valid >> i & 1) && key != kForced && key <= floor_key && key >= low && key <= last) atomicAdd(histogram + ((key - low) >> shift), 1u);
    }
  }
  if (pass.count) add_broken(ranks, part, non_finite, forced, lane);
}

// The segment that a warp's tiles lie in, looked up when it changes.
struct Cursor {
  int segment;
  int start = 0;       // its first tile
  int next_start = 0;  // and the next segment's
  Source source{};

  __device__ explicit Cursor(int first_segment) : segment(first_segment) {}
  // Whether it has changed.
  __device__ bool move_to(const RankView& p, int tile) {
    if (tile < next_start) return false;
#pragma unroll 1
    while ((next_start = p.tile_start[segment + 1]) <= tile) ++segment;
    start = p.tile_start[segment];
    source = Source(p.scores, segment);
    return true;
  }
  __device__ int begin(int tile) const { return (tile - start) * kTile; }
};

// One read of all scores.
__device__ inline void collect(const RankView& p, const Pass& pass, const Run& run) {
  const Ranks& ranks = p.search[pass.search].ranks;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float* const stage = stage_of(warp);
  uint32_t* const histogram = shared_histogram();
  const bool narrow = p.pool.narrow();
  const bool lists = pass.goal != Goal::kProve;
  const auto [part, first_tile, end_tile, first_segment, low, last, shift] = run;
  uint32_t non_finite = 0;
  uint32_t forced = 0;
  uint32_t above = 0;
  uint32_t inside = 0;
  int guarded_until = 0;
  int guarded_from = 0;
  Cursor at(first_segment);
#pragma unroll 1
  for (int tile = first_tile + warp; tile < end_tile; tile += kRankWarps) {
    if (at.move_to(p, tile)) {
      const int32_t* bounds = p.protection.of(at.segment);
      guarded_from = bounds[0];
      guarded_until = p.protection.ranges == 0 ? 0 : bounds[2 * p.protection.ranges];
    }
    const int segment = at.segment;
    const Source& source = at.source;
    const int begin = at.begin(tile);
    const uint32_t floor_key = floor_key_of(p, pass, segment);
    if (begin == 0 && lane == 0 && pass.floored) subtract_floor(p, segment, low, last, shift, histogram);
    // Floors took what is above their keys; entries of just those keys are listed too.
    const uint32_t highest = min(last, floor_key);
    const uint32_t lowest = min(low, floor_key);
    TileMasks masks{};
    uint32_t outside = 0;  // kept outside the ranking
    if (narrow && compare_tile(p, source, begin, lane, lowest, highest, masks)) {
      if (begin < guarded_until || begin + kTile > guarded_from) {
        outside = protected_tokens(RunProtection(p.protection, segment, begin, begin + kTile), source, begin, lane);
        masks.above |= outside;
        masks.inside &= ~outside;
      }
    } else {
      const SlowTile slow = compare_slowly(p, segment, begin, lowest, highest, lane, stage);
      masks = {slow.above, slow.inside};
      outside = slow.forced;
      non_finite += slow.non_finite;
      forced += slow.non_finite_forced;
    }
    above += __popc(masks.above & ~outside);
    inside += __popc(masks.inside);
    if (!lists) continue;
    p.collected.kept[int64_t{tile} * kTileWords + lane] = masks.above;
    uint16_t* list = reinterpret_cast<uint16_t*>(stage);
    const int listed = __any_sync(~0u, masks.inside != 0) ? list_tokens(masks.inside, lane, list) : 0;
    if (lane == 0) p.collected.count[tile] = listed;
#pragma unroll 1
    for (int i = lane; i < listed; i += 32) {
      const int token = begin + list[i];
      const uint32_t key = key_at(p.pool, source, token);
      if (i < p.collected.slots) p.collected.candidate[int64_t{tile} * p.collected.slots + i] = make_uint2(key, static_cast<uint32_t>(token - begin));
      if (key >= low && key <= last && key <= floor_key) atomicAdd(histogram + ((key - low) >> shift), 1u);
    }
  }
  if (pass.count) {
    add_broken(ranks, part, non_finite, forced, lane);
    above = __reduce_add_sync(~0u, above);
    inside = __reduce_add_sync(~0u, inside);
    if (lane == 0 && above != 0) atomicAdd(ranks.above + part, above);
    if (lane == 0 && inside != 0) atomicAdd(ranks.inside + part, inside);
  }
}

// The lists of the tiles [first, first + 8) that are before `end`, but for those that are too long: calls body(tile - first, key and token). By a
// warp, one list behind the other, and what it needs of memory at once.
template <typename Body>
__device__ inline void for_each_listed(const RankView& p, int first, int end, int lane, Body&& body) {
  constexpr int kAtOnce = 4;
  int upto = lane < 8 && first + lane < end ? p.collected.count[first + lane] : 0;
  if (upto > p.collected.slots) upto = 0;
#pragma unroll
  for (int step = 1; step < 8; step *= 2) {
    const int other = __shfl_up_sync(~0u, upto, step);
    if (lane >= step) upto += other;
  }
  const int total = __shfl_sync(~0u, upto, 7);
#pragma unroll 1
  for (int base = 0; base < total; base += 32 * kAtOnce) {
    uint2 candidate[kAtOnce];
    int tile[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = base + u * 32 + lane;
      int k = __shfl_sync(~0u, upto, 3) <= i ? 4 : 0;
      k += __shfl_sync(~0u, upto, k + 1) <= i ? 2 : 0;
      k += __shfl_sync(~0u, upto, k) <= i ? 1 : 0;
      const int before = __shfl_sync(~0u, upto, max(k - 1, 0));
      tile[u] = k;
      candidate[u] = {0, 0};
      if (i < total) candidate[u] = p.collected.candidate[int64_t{first + k} * p.collected.slots + i - (k == 0 ? 0 : before)];
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
      if (base + u * 32 + lane < total) body(tile[u], candidate[u]);
  }
}

__device__ inline void refine(const RankView& p, const Pass& pass, const Run& run) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float* const stage = stage_of(warp);
  uint32_t* const histogram = shared_histogram();
  const auto [part, first_tile, end_tile, first_segment, low, last, shift] = run;
  int segment = first_segment;
#pragma unroll 1
  for (int first = first_tile + warp * 8; first < end_tile; first += kRankWarps * 8) {
    for_each_listed(p, first, end_tile, lane, [&](int k, uint2 candidate) {
      const uint32_t key = candidate.x;
      uint32_t floor_key = kForced - 1;
      if (pass.floored) floor_key = p.search[kOfHeads].ranks.key[segment_of_tile(p.tile_start, p.scores.segments(), first + k)];
      if (key >= low && key <= last && key <= floor_key) atomicAdd(histogram + ((key - low) >> shift), 1u);
    });
    const int mine = first + lane / 4;
    const bool too_many = mine < end_tile && p.collected.count[mine] > p.collected.slots;
    const uint32_t long_ones = __ballot_sync(~0u, too_many && lane % 4 == 0);
    if (!pass.floored && long_ones == 0) continue;
#pragma unroll 1
    for (int k = 0; k < 8 && first + k < end_tile; ++k) {
      const int tile = first + k;
#pragma unroll 1
      while (p.tile_start[segment + 1] <= tile) ++segment;
      const int begin = (tile - p.tile_start[segment]) * kTile;
      if (begin == 0 && lane == 0 && pass.floored) subtract_floor(p, segment, low, last, shift, histogram);
      if (!(long_ones >> (4 * k) & 1)) continue;
      const uint32_t floor_key = floor_key_of(p, pass, segment);
      const TileMasks masks = compare_again(p, segment, begin, low, min(last, floor_key), lane, stage);
      const Source source(p.scores, segment);
      uint16_t* list = reinterpret_cast<uint16_t*>(stage);
      const int listed_again = list_tokens(masks.inside, lane, list);
#pragma unroll 1
      for (int i = lane; i < listed_again; i += 32) {
        const int token = begin + list[i];
        const uint32_t key = key_at(p.pool, source, token);
        atomicAdd(histogram + ((key - low) >> shift), 1u);
      }
    }
  }
}

// A pass over the block's tiles, part by part.
__device__ inline void search(const RankView& p, const Pass& pass, const Share& share) {
  const Search& search = p.search[pass.search];
  const bool one = search.parts.count() == 1;
  int segment = share.segment;
#pragma unroll 1
  for (int tile = share.first; tile < share.end;) {
    Run run{0, tile, share.end, segment, 0, kForced, 0};
    if (!one) {
      run.part = search.parts.of(segment);
      run.end = tile;
#pragma unroll 1
      for (int after = segment; run.end < share.end && (p.tile_start[after + 1] == run.end || search.parts.of(after) == run.part);)
        run.end = min(share.end, p.tile_start[++after]);
    }
    tile = run.end;
    if (!pass.again || search.ranks.failed[run.part] != 0) {
      if (!pass.first()) {
        run.low = search.ranks.low[run.part];
        run.last = search.ranks.last[run.part];
      }
      run.shift = shift_of(run.low, run.last, pass.bits);
      auto* const histogram = reinterpret_cast<uint4*>(shared_histogram());
#pragma unroll 1
      for (int i = threadIdx.x; i < (1 << pass.bits) / 4; i += kRankThreads) histogram[i] = {0, 0, 0, 0};
      __syncthreads();
      switch (pass.kind) {
        case Pass::Kind::kCollect: collect(p, pass, run); break;
        case Pass::Kind::kRefine: refine(p, pass, run); break;
        default:
          switch (p.pool.mean || p.pool.halo > kShuffled ? -1 : p.pool.halo) {
            case 0: find_range<0>(p, pass, run); break;
            case 1: find_range<1>(p, pass, run); break;
            case 2: find_range<2>(p, pass, run); break;
            case 3: find_range<3>(p, pass, run); break;
            default: find_range<-1>(p, pass, run); break;
          }
      }
      finish_run(p, pass, run);
    }
    if (tile < share.end)
#pragma unroll 1
      while (p.tile_start[segment + 1] <= tile) ++segment;
    __syncthreads();
  }
}

}  // namespace laprox::cuda
