// Which entries are kept, given scores:
//
//   key(t)  = the pooled score of t as an unsigned integer of the same order; the largest for what is kept outside the ranking
//   T       = the k-th largest key of a part
//   kept(t) = key(t) > T, or key(t) = T and fewer than `ties` entries of T before it in (layer, head, token)
//
// Bytes: one read of the scores and a sixteenth of another; a bit a score for what lies above T's range, 8 bytes for each entry
// in it.
//   find_range   a sample of pooled keys -> counts in 8192 bins -> a range of keys that holds T, but for bad luck
//   collect      all scores: a bit for every key above the range; for those in it a list a tile and counts in 2048 bins. Whether
//                the range held T is known then; where it did not, both run again, without sampling
//   refine       the lists -> the exact T and how many of its ties are kept
//   count_kept   kept entries before each tile of a segment, shares of the ties, offsets of the segments
//   emit         the kept tokens, ascending
// A list that is too short (ties, narrow distributions) is not used: the tile's keys are computed again from its scores.
//
// Layout: a warp takes a tile of 1024 tokens, a lane four neighbouring ones of each run of 128: 16-byte loads. To be above a
// bound after max-pooling is to have a neighbour above it, so collect compares raw scores, gathers the bits so that
// a lane has those of 32 neighbours, and widens the masks with shifts. Keys
// are made for entries in the range only, one a lane. Means, very wide pooling and tiles with scores that are not finite take a
// slower way through shared memory.
// A block walks consecutive tiles and keeps its counts in shared memory until the part changes. Counts are integers, so nothing
// depends on the order of blocks.
#pragma once

#include "cuda/kernels/blocks.cuh"
#include "cuda/kernels/report.cuh"
#include "cuda/kernels/select_views.cuh"

namespace laprox::cuda {

inline constexpr int kRankThreads = 512;
inline constexpr int kRankWarps = kRankThreads / 32;
inline constexpr int kRuns = kTile / kRun;
inline constexpr int kMaxHalo = 127;
inline constexpr int kStage = kTile / 2;  // floats of a warp in shared memory: a run of scores and its neighbours, or a list of a tile's tokens
static_assert(kStage >= kRun + 2 * (kMaxHalo + 1));
inline constexpr int kNarrow = 31;        // neighbours on each side that masks are widened by
inline constexpr int kShuffled = 3;       // and that lanes beside have
inline constexpr int kMaxRangeBits = 22;  // of a sampled range: what two passes of 2048 bins take apart
inline constexpr int kMostBits = 13;      // of a histogram

// What a search looks for, or goes on with.
enum class Goal {
  kSample,      // about what the budget leaves beside protected entries; the range is wide enough for a sample's error
  kExact,       // what the budget leaves beside protected and non-finite entries
  kBudget,      // the same, in a range that a sample gave
  kTarget,      // the target that is there
  kFloor,       // of a head: its share of the target, times `share`
  kRest,        // what the floors left
  kShare,       // about `share` of the budget, protected entries included; a few more rather than fewer
  kFloorShare,  // of a head: its protected entries, and `share` of the rest of the budget
  kProve,       // whether the keys from the range's low end on are as many as the budget leaves
  kContinue     // in the range that was found
};

struct PoolRule {
  int32_t mean;  // or the maximum
  int32_t halo;  // neighbours on each side

  __host__ __device__ bool narrow() const { return !mean && halo <= kNarrow; }
};

struct RankPass {
  ScoreView scores;
  const int32_t* tile_start;  // [segments + 1]
  Protection protection;
  PoolRule pool;
  bool bounds;  // scores are negated upper bounds: their magnitudes are ranked, and nothing is kept outside the ranking
  bool count;   // non-finite scores
  bool again;   // only for parts whose sample failed
  bool refuse_non_finite;
  Parts parts;                  // of the rule
  Parts ranked;                 // that are searched: the same, or the heads
  Ranks ranks;                  // of `ranked`
  const int64_t* targets;       // kFloor: what each part of the rule ranks
  unsigned long long* granted;  // [parts]: entries that floors took
  const uint32_t* floor_key;    // [segments] or null: floors took keys above it
  const int64_t* floor_ties;    // [segments]: and so many of just it
  Goal goal;
  double share;
  float deviations;  // of a sample that a range allows for
  int32_t bits;      // of the histogram
  int32_t index;     // of the pass
  Collected collected;

  __device__ bool first() const { return goal != Goal::kContinue && goal != Goal::kBudget && goal != Goal::kProve; }
};

// The low bits of a key that do not count for its bin, in a range of keys.
__device__ inline int shift_of(uint32_t low, uint32_t last, int bits) { return max(32 - __clz(last - low) - bits, 0); }

__device__ inline float cleaned(float x) { return finite(x) ? x : absent_score(); }

// One segment's scores.
struct Source {
  const float* own;
  int length;
  bool aligned;

  __device__ Source(const ScoreView& scores, int segment) : own(scores.data + scores.offset(segment)), length(scores.length(segment)) {
    aligned = reinterpret_cast<uintptr_t>(own) % 16 == 0;
  }

  // Four scores from `token` on; `none` where there are no tokens.
  __device__ float4 load4(int token, float none) const {
    if (token >= 0 && token + 4 <= length && aligned) return *reinterpret_cast<const float4*>(own + token);
    float4 v = {none, none, none, none};
    if (token < 0 || token >= length) return v;
    v.x = own[token];
    if (token + 1 < length) v.y = own[token + 1];
    if (token + 2 < length) v.z = own[token + 2];
    if (token + 3 < length) v.w = own[token + 3];
    return v;
  }
};

// Protected tokens of a run of tokens.
struct RunProtection {
  const int32_t* bounds;
  int recent;
  int first;  // ranges [first, end) reach into it
  int end;
  bool any;

  __device__ RunProtection(const Protection& protection, int segment, int begin, int until) : bounds(protection.of(segment)) {
    recent = bounds[0];
    first = 0;
    while (first < protection.ranges && bounds[2 + 2 * first] <= begin) ++first;
    end = first;
    while (end < protection.ranges && bounds[1 + 2 * end] < until) ++end;
    any = recent < until || first < end;
  }
  __device__ bool covers(int token) const {
    bool inside = token >= recent;
    for (int r = first; r < end; ++r) inside |= token >= bounds[1 + 2 * r] && token < bounds[2 + 2 * r];
    return inside;
  }
};

// Four tokens of a lane.
struct Keys {
  uint32_t key[4];
  uint32_t valid;   // bit i: token i is one of the segment
  uint32_t broken;  // bit i: its score is not finite
};

// The maxima over the `kHalo` neighbours of each of four tokens, from the lanes beside; `edge` holds the run before in lane 0
// and the one after in lane 31.
template <int kHalo>
__device__ inline float4 pool_by_shuffles(const float (&own)[4], const float (&edge)[4], int lane) {
  float pooled[4];
  float before[kHalo + 1], after[kHalo + 1];  // of the h + 1 tokens just outside
  float suffix[2] = {absent_score(), absent_score()};
  float prefix[2] = {absent_score(), absent_score()};
#pragma unroll
  for (int h = 0; h < kHalo; ++h) {
    suffix[0] = fmaxf(suffix[0], own[3 - h]);
    suffix[1] = fmaxf(suffix[1], edge[3 - h]);
    prefix[0] = fmaxf(prefix[0], own[h]);
    prefix[1] = fmaxf(prefix[1], edge[h]);
    before[h] = __shfl_up_sync(~0u, suffix[0], 1);
    if (lane == 0) before[h] = suffix[1];
    after[h] = __shfl_down_sync(~0u, prefix[0], 1);
    if (lane == 31) after[h] = prefix[1];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float largest = own[i];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j != i && j - i <= kHalo && i - j <= kHalo) largest = fmaxf(largest, own[j]);
    if (kHalo > i) largest = fmaxf(largest, before[kHalo - i - 1]);
    if (kHalo + i > 3) largest = fmaxf(largest, after[kHalo + i - 4]);
    pooled[i] = largest;
  }
  return {pooled[0], pooled[1], pooled[2], pooled[3]};
}

// The same by any rule, through shared memory; means in the order of tokens, as native/cpu/ranking.cpp adds them.
__device__ __noinline__ float4 pool_through_stage(const float* own, int length, PoolRule rule, bool magnitudes, int begin, int lane, float* stage) {
  float pooled[4];
  __syncwarp();
  for (int i = lane; i < kRun + 2 * rule.halo; i += 32) {
    const int token = begin - rule.halo + i;
    float x = token >= 0 && token < length ? own[token] : absent_score();
    if (magnitudes) x = fabsf(x);
    stage[i] = cleaned(x);
  }
  __syncwarp();
  const int width = 2 * rule.halo + 1;
  const float* window = stage + lane * 4;
  if (rule.mean) {
    float sum[4] = {0, 0, 0, 0};
    int neighbours[4] = {0, 0, 0, 0};
    for (int j = 0; j < width + 3; ++j) {
      const float x = window[j];
      const bool there = x != absent_score();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!there || j < i || j >= i + width) continue;
        sum[i] = __fadd_rn(sum[i], x);
        ++neighbours[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) pooled[i] = neighbours[i] == 0 ? absent_score() : __fdiv_rn(sum[i], static_cast<float>(neighbours[i]));
  } else {
    float largest[4] = {absent_score(), absent_score(), absent_score(), absent_score()};
    for (int j = 0; j < width + 3; ++j) {
      const float x = window[j];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (j >= i && j < i + width) largest[i] = fmaxf(largest[i], x);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) pooled[i] = largest[i];
  }
  return {pooled[0], pooled[1], pooled[2], pooled[3]};
}

__device__ inline Keys make_keys(const RankPass& p, float4 v, float4 pooled, const Source& source, const RunProtection& guarded, int begin,
                                 int lane) {
  Keys keys;
  const int left = source.length - begin - lane * 4;
  keys.valid = left >= 4 ? 0xf : left <= 0 ? 0 : (1u << left) - 1;
  keys.broken = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float own = component(v, i);
    if (!finite(own)) keys.broken |= 1u << i;
    keys.key[i] = key_of(component(pooled, i));
  }
  keys.broken &= keys.valid;
  if (keys.broken != 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (keys.broken >> i & 1) keys.key[i] = kForced;
  }
  if (guarded.any && !p.bounds) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (guarded.covers(begin + lane * 4 + i)) keys.key[i] = kForced;
  }
  return keys;
}

// Keys of a run, by any rule.
__device__ inline Keys keys_of_run(const RankPass& p, const Source& source, const RunProtection& guarded, int begin, int lane, float* stage) {
  const float4 v = source.load4(begin + lane * 4, absent_score());
  const float4 pooled = pool_through_stage(source.own, source.length, p.pool, p.bounds, begin, lane, stage);
  return make_keys(p, v, pooled, source, guarded, begin, lane);
}

__device__ inline uint32_t floor_key_of(const RankPass& p, int segment) { return p.floor_key == nullptr ? kForced - 1 : p.floor_key[segment]; }

// Counts what is not finite among a lane's tokens, and of that what is not protected.
__device__ inline void count_broken(const Keys& keys, const RunProtection& guarded, int first_token, uint32_t& non_finite, uint32_t& forced) {
  if (keys.broken == 0) return;
  non_finite += __popc(keys.broken);
#pragma unroll
  for (int i = 0; i < 4; ++i) forced += (keys.broken >> i & 1) && !(guarded.any && guarded.covers(first_token + i));
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
__device__ inline int64_t goal_of(const RankPass& p, int part) {
  const Ranks& ranks = p.ranks;
  switch (p.goal) {
    case Goal::kSample: return p.parts.quota[part] - p.parts.guarded[part];
    case Goal::kExact:
    case Goal::kBudget:
    case Goal::kProve: return p.parts.quota[part] - p.parts.guarded[part] - __ldcg(ranks.forced + part);
    case Goal::kTarget: return ranks.target[part];
    case Goal::kFloor: {
      const auto target = static_cast<double>(p.targets[p.parts.of(part)]);
      return static_cast<int64_t>(floor(__ddiv_rn(__dmul_rn(p.share, target), static_cast<double>(p.parts.segments_each()))));
    }
    case Goal::kRest: return ranks.target[part] - static_cast<int64_t>(p.granted[part]);
    case Goal::kShare: return static_cast<int64_t>(ceil(__dmul_rn(p.share, static_cast<double>(p.parts.quota[part]))));
    case Goal::kFloorShare: {
      const int outer = p.parts.of(part);
      const auto target = static_cast<double>(p.parts.quota[outer] - p.parts.guarded[outer]);
      auto goal = static_cast<int64_t>(floor(__ddiv_rn(__dmul_rn(p.share, target), static_cast<double>(p.parts.segments_each()))));
      const int32_t* bounds = p.protection.of(part);
      goal += p.scores.length(part) - bounds[0];
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
__device__ inline void pick(const RankPass& p, int part, uint32_t low, uint32_t last, uint32_t* shared, uint32_t* scratch) {
  const Ranks& ranks = p.ranks;
  const int bins = 1 << p.bits;
  const int shift = shift_of(low, last, p.bits);
  const bool sampled = p.goal == Goal::kSample || p.goal == Goal::kShare;
  int64_t goal = goal_of(p, part);
  const int stride = sampled ? ranks.stride[part] : 1;
  const int64_t all = sampled ? p.parts.entries[part] - (p.goal == Goal::kSample ? p.parts.guarded[part] : 0) : 0;  // keys of the part
  const int64_t above_range = p.goal == Goal::kBudget || p.goal == Goal::kProve ? __ldcg(ranks.above + part) : 0;
  uint4* histogram = reinterpret_cast<uint4*>(ranks.histogram + (int64_t{part} << p.bits));
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
  uint32_t total = 0;
  const int64_t before = block_prefix(own, scratch, total);
  if (p.goal == Goal::kFloor || p.goal == Goal::kFloorShare) goal = min(goal, int64_t{total});
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
      goal -= p.goal == Goal::kSample ? all - total : 0;  // the keys that are missing were not finite
      ranks_wanted[0] = ranks_wanted[1] = min(max(goal, int64_t{1}), int64_t{total});
    }
    everything = ranks_wanted[1] > int64_t{total};
  }
  if (p.goal == Goal::kBudget) ranks_wanted[0] = goal - above_range;
  if (threadIdx.x < 2) reached[threadIdx.x] = -1;
  __syncthreads();
  for (int w = 0; w < 2; ++w) {
    const int64_t wanted = ranks_wanted[w];
    if (!(wanted > before && wanted <= before + own)) continue;
    int64_t above = before;
    int bin = top;
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
    } else if (p.goal == Goal::kShare) {
      ranks.low[part] = everything || reached[1] < 0 ? 0 : edge(reached[1]);
    } else {
      const uint32_t from = everything || reached[1] < 0 ? 0 : edge(reached[1]);
      const uint32_t until = reached[0] < 0 ? kForced - 1 : edge(reached[0]) + width;
      // A range that only proves something may be as wide as it likes.
      if (32 - __clz(until - from) > kMaxRangeBits && p.share == 0)
        fail_part(ranks, part);
      else
        set_range(ranks, part, from, until, kForced - 1, 0, 0);
    }
    return;
  }
  if (p.goal == Goal::kExact || p.goal == Goal::kBudget || p.goal == Goal::kProve) {
    if (p.refuse_non_finite && __ldcg(ranks.non_finite + part) > 0) report_status(p.scores.status, LPX_NON_FINITE);
    if (goal < 0) report_status(p.scores.status, LPX_BUDGET_TOO_SMALL);
    ranks.target[part] = max(goal, int64_t{0});
  }
  if (p.goal == Goal::kFloor && goal > 0) atomicAdd(p.granted + p.parts.of(part), static_cast<unsigned long long>(goal));
  if (goal <= 0) {  // above every key that is ranked
    set_range(ranks, part, kForced, kForced, kForced - 1, 0, 0);
  } else if (p.goal == Goal::kProve) {
    if (above_range + __ldcg(ranks.inside + part) < goal) ranks.low[part] = 0;
  } else if (p.goal == Goal::kBudget && ranks.failed[part] != 0) {
    return;
  } else if (reached[0] >= 0) {
    const uint32_t from = edge(reached[0]);
    const int64_t left = ranks_wanted[0] - beyond[0];
    set_range(ranks, part, from, from + width, from, left, left);
  } else if (p.goal == Goal::kBudget) {
    fail_part(ranks, part);
  } else {  // fewer keys than that: all of them
    set_range(ranks, part, 0, 0, 0, goal, 0);
  }
}

// Tells the part that tiles of it are counted. The last block to do so ends the pass for it.
__device__ inline void finish_run(const RankPass& p, int part, int tiles, uint32_t low, uint32_t last, uint32_t* histogram, uint32_t* scratch) {
  __shared__ uint32_t finished;
  __syncthreads();
  for (int i = threadIdx.x; i < 1 << p.bits; i += kRankThreads)
    if (histogram[i] != 0) atomicAdd(p.ranks.histogram + (int64_t{part} << p.bits) + i, histogram[i]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    finished = atomicAdd(p.ranks.done + int64_t{p.index} * p.ranked.count() + part, static_cast<uint32_t>(tiles)) + static_cast<uint32_t>(tiles);
  __syncthreads();
  if (finished != static_cast<uint32_t>(p.ranked.tiles[part])) return;
  __threadfence();
  pick(p, part, low, last, histogram, scratch);
}

// What a floor took of just its own key is not ranked again. In the segment's first tile.
__device__ inline void subtract_floor(const RankPass& p, int segment, uint32_t low, uint32_t last, int shift, uint32_t* histogram) {
  const uint32_t key = p.floor_key[segment];
  if (key >= low && key <= last && p.floor_ties[segment] > 0)
    atomicAdd(histogram + ((key - low) >> shift), 0u - static_cast<uint32_t>(p.floor_ties[segment]));
}

// The tiles of a block in runs of one part: calls body(part, segment of the first tile, first tile, tile behind the last). (One in turn for every
// block spreads what is large, but each tile's segment has to be looked for then: slower.)
template <typename Body>
__device__ inline void for_each_part(const RankPass& p, Body&& body) {
  const int segments = p.scores.segments();
  const int64_t tiles = p.tile_start[segments];
  int tile = static_cast<int>(tiles * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(tiles * (blockIdx.x + 1) / gridDim.x);
  if (tile >= end) return;
  int segment = segment_of_tile_together(p.tile_start, segments, tile);
  while (tile < end) {
    const int part = p.ranked.of(segment);
    int run = tile;
    int after = segment;
    while (run < end && (p.tile_start[after + 1] == run || p.ranked.of(after) == part)) run = min(end, p.tile_start[++after]);
    if (!p.again || p.ranks.failed[part] != 0) body(part, segment, tile, run);
    tile = run;
    if (tile < end)
      while (p.tile_start[segment + 1] <= tile) ++segment;
    __syncthreads();
  }
}

// Counts keys; of a part's range where one is known, of a sample of the part where it is large.
template <int kHalo>  // -1: any
__global__ void __launch_bounds__(kRankThreads, 2) find_range(const __grid_constant__ RankPass p) {
  follow_previous();
  if (*p.scores.status != LPX_OK || (p.again && *p.ranks.failures == 0)) return;
  extern __shared__ __align__(16) uint32_t histogram[];  // [1 << bits], then the stages
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  float* stage = reinterpret_cast<float*>(histogram + (1 << p.bits)) + warp * kStage;
  __shared__ uint32_t scratch[32];
  for_each_part(p, [&](int part, int first_segment, int tile, int run) {
    const uint32_t low = p.first() ? 0 : p.ranks.low[part];
    const uint32_t last = p.first() ? kForced : p.ranks.last[part];
    const int shift = shift_of(low, last, p.bits);
    const int stride = p.goal == Goal::kSample || p.goal == Goal::kShare ? p.ranks.stride[part] : 1;
    const bool whole = p.first() && p.floor_key == nullptr;  // every key that is ranked
    for (int i = threadIdx.x; i < 1 << p.bits; i += kRankThreads) histogram[i] = 0;
    __syncthreads();
    int segment = first_segment;
    uint32_t non_finite = 0;
    uint32_t forced = 0;
    const int runs = (run - tile) * kRuns;
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
      while (p.tile_start[segment + 1] <= own) ++segment;
      const Source source(p.scores, segment);
      const int begin = (own - p.tile_start[segment]) * kTile + index % kRuns * kRun;
      if (begin == 0 && lane == 0 && p.floor_key != nullptr) subtract_floor(p, segment, low, last, shift, histogram);
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
      if (p.count) count_broken(keys, guarded, begin + lane * 4, non_finite, forced);
      const uint32_t floor_key = floor_key_of(p, segment);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t key = keys.key[i];
        if ((keys.valid >> i & 1) && key != kForced && key <= floor_key && key >= low && key <= last)
          atomicAdd(histogram + ((key - low) >> shift), 1u);
      }
    }
    if (p.count) add_broken(p.ranks, part, non_finite, forced, lane);
    finish_run(p, part, run - tile, low, last, histogram, scratch);
  });
}

// From votes to neighbours: lane 4 * r + j has bit l for token 4 * l + j of run r; afterwards bit b of lane w is token 32 * w + b.
__device__ inline uint32_t transposed(uint32_t votes, int lane) {
  uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t x = __shfl_sync(~0u, votes, (lane & ~3) + j) >> (8 * (lane & 3)) & 0xff;
    x = (x | x << 12) & 0x000f000fu;
    x = (x | x << 6) & 0x03030303u;
    x = (x | x << 3) & 0x11111111u;
    word |= x << j;
  }
  return word;
}

// Widens a mask by `halo` tokens. before, after: the words beside the tile.
__device__ inline uint32_t widen(uint32_t word, int halo, uint32_t before, uint32_t after, int lane) {
  uint32_t previous = __shfl_up_sync(~0u, word, 1);
  if (lane == 0) previous = before;
  uint32_t next = __shfl_down_sync(~0u, word, 1);
  if (lane == 31) next = after;
  uint32_t wide = word;
  for (int d = 1; d <= halo; ++d) wide |= __funnelshift_l(previous, word, d) | __funnelshift_r(word, next, d);
  return wide;
}

// Of a tile, a word a lane.
struct TileMasks {
  uint32_t above;  // tokens above a range of keys
  uint32_t inside;
};

// Masks of a tile from comparisons of raw scores, without regard to protection. False where some of them are not finite.
__device__ inline bool compare_tile(const RankPass& p, const Source& source, int begin, int lane, float low, float last, TileMasks& masks) {
  float4 v[kRuns];
  if (source.aligned && begin + kTile <= source.length) {
    const float4* own = reinterpret_cast<const float4*>(source.own + begin) + lane;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) v[r] = own[r * (kRun / 4)];
  } else {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) v[r] = source.load4(begin + r * kRun + lane * 4, 0);
  }
  float before = 0;
  float after = 0;
  const bool has_before = lane < p.pool.halo && begin - 1 - lane >= 0;
  const bool has_after = lane < p.pool.halo && begin + kTile + lane < source.length;
  if (has_before) before = source.own[begin - 1 - lane];
  if (has_after) after = source.own[begin + kTile + lane];
  const float infinity = __uint_as_float(0x7f800000u);
  bool clean = fabsf(before) < infinity && fabsf(after) < infinity;
#pragma unroll
  for (int i = 0; i < 4 * kRuns; ++i) clean = clean && fabsf(component(v[i / 4], i % 4)) < infinity;
  if (!__all_sync(~0u, clean)) return false;
  uint32_t above = 0;
  uint32_t reach = 0;
#pragma unroll
  for (int i = 0; i < 4 * kRuns; ++i) {
    const float x = component(v[i / 4], i % 4);
    if (x > last) above |= 1u << i;
    if (x >= low) reach |= 1u << i;
  }
  const uint32_t valid = mask_of(lane, 0, source.length - begin);
  above = gathered(above, lane) & valid;
  reach = gathered(reach, lane) & valid;
  const uint32_t above_before = __brev(__ballot_sync(~0u, has_before && before > last));
  const uint32_t above_after = __ballot_sync(~0u, has_after && after > last);
  const uint32_t reach_before = __brev(__ballot_sync(~0u, has_before && before >= low));
  const uint32_t reach_after = __ballot_sync(~0u, has_after && after >= low);
  masks.above = widen(above, p.pool.halo, above_before, above_after, lane) & valid;
  masks.inside = widen(reach, p.pool.halo, reach_before, reach_after, lane) & valid & ~masks.above;
  return true;
}

// Protected tokens of a tile.
__device__ inline uint32_t protected_tokens(const RunProtection& guarded, const Source& source, int begin, int lane) {
  if (!guarded.any) return 0;
  uint32_t mask = mask_of(lane, guarded.recent - begin, kTile);
  for (int r = guarded.first; r < guarded.end; ++r) mask |= mask_of(lane, guarded.bounds[1 + 2 * r] - begin, guarded.bounds[2 + 2 * r] - begin);
  return mask & mask_of(lane, 0, source.length - begin);
}

// The same masks by any rule and of any scores; forced tokens are above.
struct SlowTile {
  uint32_t above;
  uint32_t inside;
  uint32_t forced;
  uint32_t non_finite;         // of this lane's tokens
  uint32_t non_finite_forced;  // of them, not protected
};
__device__ __noinline__ SlowTile compare_slowly(const RankPass& p, int segment, int begin, uint32_t low, uint32_t last, int lane, float* stage) {
  SlowTile tile{};
  const Source source(p.scores, segment);
  const RunProtection guarded(p.protection, segment, begin, begin + kTile);
#pragma unroll 1
  for (int r = 0; r < kRuns && begin + r * kRun < source.length; ++r) {
    const Keys keys = keys_of_run(p, source, guarded, begin + r * kRun, lane, stage);
    count_broken(keys, guarded, begin + r * kRun + lane * 4, tile.non_finite, tile.non_finite_forced);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = keys.key[i];
      const bool valid = keys.valid >> i & 1;
      const uint32_t forced = __ballot_sync(~0u, valid && key == kForced);
      const uint32_t above = __ballot_sync(~0u, valid && key > last);
      const uint32_t inside = __ballot_sync(~0u, valid && key >= low && key <= last);
      if (lane == r * 4 + i) {
        tile.forced = forced;
        tile.above = above | forced;
        tile.inside = inside;
      }
    }
  }
  tile.forced = transposed(tile.forced, lane);
  tile.above = transposed(tile.above, lane);
  tile.inside = transposed(tile.inside, lane) & ~tile.forced;
  return tile;
}

// The key of a token that is not protected and whose tile is clean, or of one whose score is finite.
__device__ inline uint32_t key_at(const PoolRule& rule, const Source& source, int token) {
  float largest = absent_score();
#pragma unroll 7
  for (int d = -rule.halo; d <= rule.halo; ++d) {
    const int other = token + d;
    if (other >= 0 && other < source.length) largest = fmaxf(largest, cleaned(source.own[other]));
  }
  return key_of(largest);
}
__device__ __noinline__ uint32_t mean_key_at(PoolRule rule, const float* own, int length, int token) {
  float sum = 0;
  int neighbours = 0;
  for (int d = -rule.halo; d <= rule.halo; ++d) {
    const int other = token + d;
    const float x = other >= 0 && other < length ? cleaned(own[other]) : absent_score();
    if (x == absent_score()) continue;
    sum = __fadd_rn(sum, x);
    ++neighbours;
  }
  return key_of(neighbours == 0 ? absent_score() : __fdiv_rn(sum, static_cast<float>(neighbours)));
}

// One read of all scores.
__global__ void __launch_bounds__(kRankThreads, 2) collect(const __grid_constant__ RankPass p) {
  follow_previous();
  if (*p.scores.status != LPX_OK || (p.again && *p.ranks.failures == 0)) return;
  extern __shared__ __align__(16) uint32_t histogram[];  // [1 << bits], then the stages
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  float* stage = reinterpret_cast<float*>(histogram + (1 << p.bits)) + warp * kStage;
  __shared__ uint32_t scratch[32];
  const bool narrow = p.pool.narrow();
  const bool lists = p.goal != Goal::kProve;
  for_each_part(p, [&](int part, int first_segment, int first_tile, int end_tile) {
    const uint32_t low = p.ranks.low[part];
    const uint32_t last = p.ranks.last[part];
    const int shift = shift_of(low, last, p.bits);
    for (int i = threadIdx.x; i < 1 << p.bits; i += kRankThreads) histogram[i] = 0;
    __syncthreads();
    int segment = first_segment;
    uint32_t non_finite = 0;
    uint32_t forced = 0;
    uint32_t above = 0;
    uint32_t inside = 0;
    for (int tile = first_tile + warp; tile < end_tile; tile += kRankWarps) {
      while (p.tile_start[segment + 1] <= tile) ++segment;
      const Source source(p.scores, segment);
      const int begin = (tile - p.tile_start[segment]) * kTile;
      const uint32_t floor_key = floor_key_of(p, segment);
      if (begin == 0 && lane == 0 && p.floor_key != nullptr) subtract_floor(p, segment, low, last, shift, histogram);
      // Floors took what is above their keys; entries of just those keys are listed too.
      const uint32_t highest = min(last, floor_key);
      const uint32_t lowest = min(low, floor_key);
      TileMasks masks{};
      uint32_t outside = 0;  // kept outside the ranking
      if (narrow && compare_tile(p, source, begin, lane, score_of(lowest), score_of(highest), masks)) {
        outside = protected_tokens(RunProtection(p.protection, segment, begin, begin + kTile), source, begin, lane);
        masks.above |= outside;
        masks.inside &= ~outside;
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
      const int listed = __any_sync(~0u, masks.inside != 0) ? list_tokens(masks.inside, kTile, lane, list) : 0;
      if (lane == 0) p.collected.count[tile] = listed;
      for (int i = lane; i < listed; i += 32) {
        const int token = begin + list[i];
        const uint32_t key = p.pool.mean ? mean_key_at(p.pool, source.own, source.length, token) : key_at(p.pool, source, token);
        if (i < p.collected.slots)
          p.collected.candidate[int64_t{tile} * p.collected.slots + i] = make_uint2(key, static_cast<uint32_t>(token - begin));
        if (key >= low && key <= last && key <= floor_key) atomicAdd(histogram + ((key - low) >> shift), 1u);
      }
    }
    if (p.count) {
      add_broken(p.ranks, part, non_finite, forced, lane);
      above = __reduce_add_sync(~0u, above);
      inside = __reduce_add_sync(~0u, inside);
      if (lane == 0 && above != 0) atomicAdd(p.ranks.above + part, above);
      if (lane == 0 && inside != 0) atomicAdd(p.ranks.inside + part, inside);
    }
    finish_run(p, part, end_tile - first_tile, low, last, histogram, scratch);
  });
}

// Masks of a tile whose candidates were too many to list; what is kept outside the ranking is above.
__device__ __noinline__ TileMasks compare_again(const RankPass& p, int segment, int begin, uint32_t low, uint32_t last, int lane, float* stage) {
  TileMasks masks{};
  const Source source(p.scores, segment);
  if (p.pool.narrow() && compare_tile(p, source, begin, lane, score_of(low), score_of(last), masks)) {
    const uint32_t outside = protected_tokens(RunProtection(p.protection, segment, begin, begin + kTile), source, begin, lane);
    return {masks.above | outside, masks.inside & ~outside};
  }
  const SlowTile slow = compare_slowly(p, segment, begin, low, last, lane, stage);
  return {slow.above, slow.inside};
}

// The lists, eight tiles of a warp at a time: four lanes each.
__global__ void __launch_bounds__(kRankThreads, 2) refine(const __grid_constant__ RankPass p) {
  follow_previous();
  if (*p.scores.status != LPX_OK) return;
  extern __shared__ __align__(16) uint32_t histogram[];  // [1 << bits], then the stages
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  float* stage = reinterpret_cast<float*>(histogram + (1 << p.bits)) + warp * kStage;
  __shared__ uint32_t scratch[32];
  for_each_part(p, [&](int part, int first_segment, int first_tile, int end_tile) {
    const uint32_t low = p.ranks.low[part];
    const uint32_t last = p.ranks.last[part];
    const int shift = shift_of(low, last, p.bits);
    for (int i = threadIdx.x; i < 1 << p.bits; i += kRankThreads) histogram[i] = 0;
    __syncthreads();
    int segment = first_segment;
    for (int first = first_tile + warp * 8; first < end_tile; first += kRankWarps * 8) {
      const int mine = first + lane / 4;
      const int listed = mine < end_tile ? p.collected.count[mine] : 0;
      const bool too_many = listed > p.collected.slots;
      if (!too_many) {
        const uint2* own = p.collected.candidate + int64_t{mine} * p.collected.slots;
        uint32_t floor_key = kForced - 1;
        if (p.floor_key != nullptr && listed > 0) floor_key = p.floor_key[segment_of_tile(p.tile_start, p.scores.segments(), mine)];
        for (int i = lane % 4; i < listed; i += 4) {
          const uint32_t key = own[i].x;
          if (key >= low && key <= last && key <= floor_key) atomicAdd(histogram + ((key - low) >> shift), 1u);
        }
      }
      const uint32_t long_ones = __ballot_sync(~0u, too_many && lane % 4 == 0);
      if (p.floor_key == nullptr && long_ones == 0) continue;
      for (int k = 0; k < 8 && first + k < end_tile; ++k) {
        const int tile = first + k;
        while (p.tile_start[segment + 1] <= tile) ++segment;
        const int begin = (tile - p.tile_start[segment]) * kTile;
        if (begin == 0 && lane == 0 && p.floor_key != nullptr) subtract_floor(p, segment, low, last, shift, histogram);
        if (!(long_ones >> (4 * k) & 1)) continue;
        const uint32_t floor_key = floor_key_of(p, segment);
        const TileMasks masks = compare_again(p, segment, begin, low, min(last, floor_key), lane, stage);
        const Source source(p.scores, segment);
        uint16_t* list = reinterpret_cast<uint16_t*>(stage);
        const int listed_again = list_tokens(masks.inside, kTile, lane, list);
        for (int i = lane; i < listed_again; i += 32) {
          const int token = begin + list[i];
          const uint32_t key = p.pool.mean ? mean_key_at(p.pool, source.own, source.length, token) : key_at(p.pool, source, token);
          atomicAdd(histogram + ((key - low) >> shift), 1u);
        }
      }
    }
    finish_run(p, part, end_tile - first_tile, low, last, histogram, scratch);
  });
}

// Kept entries of each segment, and where they go.
struct Counts {
  int32_t* above;          // [tiles]: entries above the segment's threshold, in tiles of the segment before this one
  int32_t* ties;           // [tiles]: entries of just the threshold, likewise
  int32_t* segment;        // [tiles]
  int32_t* segment_above;  // [segments]
  int32_t* segment_ties;   // [segments]
  int32_t* quota;          // [segments]: ties that are kept
  uint32_t* done;
};

// The threshold of a segment: that of its part, or of its floor where it is lower.
__device__ inline uint32_t threshold_of(const RankPass& p, int segment) { return min(p.ranks.key[p.parts.of(segment)], floor_key_of(p, segment)); }

struct SelectionView {
  int32_t* tokens;
  int64_t capacity;
  int64_t* offsets;
};

// One block a segment; the last one shares the ties, finds the offsets and reports.
__global__ void __launch_bounds__(kRankThreads, 2)
    count_kept(const __grid_constant__ RankPass p, Counts counts, SelectionView out, lpx_report* report, const __grid_constant__ ScoresReport how) {
  follow_previous();
  __shared__ float stages[kRankWarps][kStage];
  __shared__ int64_t scratch[32];
  const int segments = p.scores.segments();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  if (*p.scores.status != LPX_OK) {
    if (blockIdx.x != 0) return;
    for (int i = threadIdx.x; i <= segments; i += kRankThreads) out.offsets[i] = 0;
    return;
  }
  for (int segment = blockIdx.x; segment < segments; segment += gridDim.x) {
    const uint32_t threshold = threshold_of(p, segment);
    const int first = p.tile_start[segment];
    const int end = p.tile_start[segment + 1];
    for (int group = first + warp * 8; group < end; group += kRankWarps * 8) {  // four lanes a tile
      const int tile = group + lane / 4;
      int above = 0;
      int ties = 0;
      int listed = 0;
      if (tile < end) {
        const uint4* kept = reinterpret_cast<const uint4*>(p.collected.kept + int64_t{tile} * kTileWords) + lane % 4 * 2;
        const uint4 a = kept[0];
        const uint4 b = kept[1];
        listed = p.collected.count[tile];
        above = __popc(a.x) + __popc(a.y) + __popc(a.z) + __popc(a.w) + __popc(b.x) + __popc(b.y) + __popc(b.z) + __popc(b.w);
        const uint2* own = p.collected.candidate + int64_t{tile} * p.collected.slots;
        for (int i = lane % 4; i < listed && listed <= p.collected.slots; i += 4) {
          const uint32_t key = own[i].x;
          above += key > threshold;
          ties += key == threshold;
        }
      }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        above += __shfl_xor_sync(~0u, above, step);
        ties += __shfl_xor_sync(~0u, ties, step);
      }
      uint32_t long_ones = __ballot_sync(~0u, listed > p.collected.slots && lane % 4 == 0);
      for (; long_ones != 0; long_ones &= long_ones - 1) {
        const int k = (__ffs(static_cast<int>(long_ones)) - 1) / 4;
        const TileMasks masks = compare_again(p, segment, (group + k - first) * kTile, threshold, threshold, lane, stages[warp]);
        const int all_above = __reduce_add_sync(~0u, __popc(masks.above));
        const int all_ties = __reduce_add_sync(~0u, __popc(masks.inside));
        if (lane / 4 == k) {
          above = all_above;
          ties = all_ties;
        }
      }
      if (tile < end && lane % 4 == 0) {
        counts.above[tile] = above;
        counts.ties[tile] = ties;
        counts.segment[tile] = segment;
      }
    }
    __syncthreads();
    int64_t so_far = 0;  // entries above; ties in the upper half: neither reaches 2^31
    for (int tile = first; tile < end; tile += kRankThreads) {
      const int own = tile + static_cast<int>(threadIdx.x);
      int64_t both = 0;
      if (own < end) both = int64_t{counts.ties[own]} << 32 | counts.above[own];
      int64_t total = 0;
      const int64_t before = so_far + block_prefix(both, scratch, total);
      if (own < end) {
        counts.above[own] = static_cast<int32_t>(before & 0xffffffff);
        counts.ties[own] = static_cast<int32_t>(before >> 32);
      }
      so_far += total;
    }
    if (threadIdx.x == 0) {
      counts.segment_above[segment] = static_cast<int32_t>(so_far & 0xffffffff);
      counts.segment_ties[segment] = static_cast<int32_t>(so_far >> 32);
    }
    __syncthreads();
  }
  if (!last_to_arrive(counts.done, gridDim.x)) return;

  // Ties go to the smaller (layer, head, token): of a segment's, `own` are kept by its floor, and `ranked` compete for what the part has left.
  struct Ties {
    int64_t own;
    int64_t ranked;
  };
  const auto ties_of = [&](int segment, uint32_t key) {
    const int64_t all = __ldcg(counts.segment_ties + segment);
    if (p.floor_key == nullptr || all == 0) return Ties{0, all};
    const uint32_t floor_key = p.floor_key[segment];
    const int64_t own = floor_key <= key ? p.floor_ties[segment] : 0;
    return Ties{own, floor_key >= key ? all - own : 0};
  };
  const int parts = p.parts.count();
  const int each = p.parts.segments_each();
  // Of the only part, mostly.
  const uint32_t only_key = p.ranks.key[0];
  const int64_t only_left = p.ranks.ties[0];
  int64_t entries = p.parts.entries[0];
  int64_t guarded = p.parts.guarded[0];
  int64_t non_finite = p.ranks.non_finite[0];
  for (int part = warp; part < parts && parts > 1; part += kRankWarps) {
    const uint32_t key = p.ranks.key[part];
    int64_t left = p.ranks.ties[part];
#pragma unroll 4
    for (int first = 0; first < each; first += 32) {
      const int i = first + lane;
      const int segment = i < each ? p.parts.segment(part, i) : 0;
      const Ties ties = i < each ? ties_of(segment, key) : Ties{0, 0};
      int64_t sum = ties.ranked;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int64_t other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
      }
      if (i < each) counts.quota[segment] = static_cast<int32_t>(ties.own + min(ties.ranked, max(left - (sum - ties.ranked), int64_t{0})));
      left -= __shfl_sync(~0u, sum, 31);
    }
  }
  __syncthreads();
  int64_t carry = 0;
  int64_t ties_before = 0;
  for (int first = 0; first < segments; first += kRankThreads) {
    const int segment = first + static_cast<int>(threadIdx.x);
    int64_t kept = segment < segments ? __ldcg(counts.segment_above + segment) : 0;
    if (parts == 1) {  // segments in order
      const Ties ties = segment < segments ? ties_of(segment, only_key) : Ties{0, 0};
      int64_t total = 0;
      const int64_t before = ties_before + block_prefix(ties.ranked, scratch, total);
      const int64_t given = ties.own + min(ties.ranked, max(only_left - before, int64_t{0}));
      if (segment < segments) counts.quota[segment] = static_cast<int32_t>(given);
      kept += given;
      ties_before += total;
    } else if (segment < segments) {
      kept += counts.quota[segment];
    }
    int64_t total = 0;
    const int64_t before = block_prefix(kept, scratch, total);
    if (segment < segments) out.offsets[segment] = carry + before;
    carry += total;
  }
  if (threadIdx.x == 0) out.offsets[segments] = carry;
  const bool fits = carry <= out.capacity;
  __syncthreads();
  if (!fits) {
    for (int i = threadIdx.x; i <= segments; i += kRankThreads) out.offsets[i] = 0;
    if (threadIdx.x == 0) report_status(p.scores.status, LPX_OUT_OF_BOUNDS);
  }
  if (report == nullptr) return;
  if (parts > 1) {
    entries = guarded = non_finite = 0;
    for (int part = threadIdx.x; part < parts; part += kRankThreads) {
      entries += p.parts.entries[part];
      guarded += p.parts.guarded[part];
      non_finite += p.ranks.non_finite[part];
    }
    entries = block_sum(entries, scratch);
    guarded = block_sum(guarded, scratch);
    non_finite = block_sum(non_finite, scratch);
  }
  report_scores(how, entries, *report);
  if (threadIdx.x != 0) return;
  report->entries = entries;
  report->kept = fits ? carry : 0;
  report->protected_entries = guarded;
  report->non_finite = non_finite;
}

// A warp a tile.
inline constexpr int kEmitThreads = 256;

__global__ void __launch_bounds__(kEmitThreads, 5) emit(const __grid_constant__ RankPass p, Counts counts, SelectionView out) {
  follow_previous();
  if (*p.scores.status != LPX_OK) return;
  __shared__ float stages[kEmitThreads / 32][kStage];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int tiles = p.tile_start[p.scores.segments()];
  for (int tile = static_cast<int>(blockIdx.x) * (kEmitThreads / 32) + warp; tile < tiles;
       tile += static_cast<int>(gridDim.x) * (kEmitThreads / 32)) {
    const int segment = counts.segment[tile];
    const int listed = p.collected.count[tile];
    uint32_t kept = p.collected.kept[int64_t{tile} * kTileWords + lane];
    const int ties_before = counts.ties[tile];
    const int above_before = counts.above[tile];
    const uint32_t threshold = threshold_of(p, segment);
    const int quota = counts.quota[segment];
    const int first_token = (tile - p.tile_start[segment]) * kTile;
    uint32_t ties = 0;
    if (listed > p.collected.slots) {
      const TileMasks masks = compare_again(p, segment, first_token, threshold, threshold, lane, stages[warp]);
      kept = masks.above;
      ties = masks.inside;
    } else if (listed > 0) {
      uint32_t* words = reinterpret_cast<uint32_t*>(stages[warp]);
      __syncwarp();
      words[lane] = 0;
      words[32 + lane] = 0;
      __syncwarp();
      for (int i = lane; i < listed; i += 32) {
        const uint2 candidate = p.collected.candidate[int64_t{tile} * p.collected.slots + i];
        if (candidate.x >= threshold) atomicOr(words + (candidate.x == threshold ? 32 : 0) + candidate.y / 32, 1u << (candidate.y % 32));
      }
      __syncwarp();
      kept |= words[lane];
      ties = words[32 + lane];
    }
    if (__any_sync(~0u, ties != 0)) {
      const int own = __popc(ties);
      int before = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, before, step);
        if (lane >= step) before += other;
      }
      const int allowed = min(max(quota - ties_before - (before - own), 0), own);  // the first ones of this lane
      for (int drop = own - allowed; drop > 0; --drop) ties &= ~(0x80000000u >> __clz(static_cast<int>(ties)));
      kept |= ties;
    }
    uint16_t* list = reinterpret_cast<uint16_t*>(stages[warp]);
    const int count = list_tokens(kept, kTile, lane, list);
    int32_t* to = out.tokens + out.offsets[segment] + above_before + min(ties_before, quota);
    for (int i = lane; i < count; i += 32) to[i] = first_token + list[i];
    __syncwarp();
  }
}

}  // namespace laprox::cuda
