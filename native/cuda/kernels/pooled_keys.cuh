// Pooled keys of a segment's tokens, one by one or compared with a range a tile at a time.
//
//   key(t) = the pooled score of t as an unsigned integer of the same order; the largest for what is kept outside the ranking
//
// Layout: a warp takes a tile of 1024 tokens, a lane four neighbouring ones of each run of 128: 16-byte loads. To be above a
// bound after max-pooling is to have a neighbour above it, so raw scores are compared; the bits are gathered so that
// a lane has those of 32 neighbours, and the masks are widened with shifts. Means, very wide pooling and tiles with scores that are
// not finite take a slower way through shared memory.
#pragma once

#include "cuda/kernels/select_views.cuh"

namespace laprox::cuda {

inline constexpr int kRuns = kTile / kRun;
inline constexpr int kMaxHalo = 127;
inline constexpr int kStage = kTile / 2;  // floats of a warp in shared memory: a run of scores and its neighbours, or a list of a tile's tokens
static_assert(kStage >= kRun + 2 * (kMaxHalo + 1));
inline constexpr int kShuffled = 3;  // neighbours on each side that lanes beside have

__device__ inline float cleaned(float x) { return finite(x) ? x : absent_score(); }

// One segment's scores.
struct Source {
  const float* own;
  int length;
  bool aligned;

  Source() = default;
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
#pragma unroll 1
    while (first < protection.ranges && bounds[2 + 2 * first] <= begin) ++first;
    end = first;
#pragma unroll 1
    while (end < protection.ranges && bounds[1 + 2 * end] < until) ++end;
    any = recent < until || first < end;
  }
  // Of the 32 tokens from `token` on, a bit each.
  __device__ uint32_t mask(int token) const {
    uint32_t inside = bits_between(recent - token, 32);
#pragma unroll 1
    for (int r = first; r < end; ++r) inside |= bits_between(bounds[1 + 2 * r] - token, bounds[2 + 2 * r] - token);
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

__device__ inline Keys make_keys(const RankView& p, float4 v, float4 pooled, const Source& source, const RunProtection& guarded, int begin,
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
    const uint32_t outside = guarded.mask(begin + lane * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (outside >> i & 1) keys.key[i] = kForced;
  }
  return keys;
}

// Keys of a run, by any rule.
__device__ inline Keys keys_of_run(const RankView& p, const Source& source, const RunProtection& guarded, int begin, int lane, float* stage) {
  const float4 v = source.load4(begin + lane * 4, absent_score());
  const float4 pooled = pool_through_stage(source.own, source.length, p.pool, p.bounds, begin, lane, stage);
  return make_keys(p, v, pooled, source, guarded, begin, lane);
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
#pragma unroll 1
  for (int d = 1; d <= halo; ++d) wide |= __funnelshift_l(previous, word, d) | __funnelshift_r(word, next, d);
  return wide;
}

// Of a tile, a word a lane.
struct TileMasks {
  uint32_t above;  // tokens above a range of keys
  uint32_t inside;
};

// Masks of a tile from comparisons of raw scores, without regard to protection. False where some of them are not finite.
__device__ inline bool compare_tile(const RankView& p, const Source& source, int begin, int lane, uint32_t low, uint32_t last, TileMasks& masks) {
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
  // Zero times what is not finite is not a number.
  float zeros[4] = {__fmul_rn(before, 0), __fmul_rn(after, 0), 0, 0};
#pragma unroll
  for (int i = 0; i < 4 * kRuns; ++i) zeros[i % 4] = __fmaf_rn(component(v[i / 4], i % 4), 0, zeros[i % 4]);
  if (!__all_sync(~0u, (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]) == 0)) return false;
  const float last_limit = limit_of(last);
  const float low_limit = low == 0 ? absent_score() : limit_of(low - 1);
  const uint32_t valid = mask_of(lane, 0, source.length - begin);
  const uint32_t over = gathered(above(v, last_limit), lane) & valid;
  const uint32_t reach = gathered(above(v, low_limit), lane) & valid;
  const uint32_t over_before = __brev(__ballot_sync(~0u, has_before && before > last_limit));
  const uint32_t over_after = __ballot_sync(~0u, has_after && after > last_limit);
  const uint32_t reach_before = __brev(__ballot_sync(~0u, has_before && before > low_limit));
  const uint32_t reach_after = __ballot_sync(~0u, has_after && after > low_limit);
  masks.above = widen(over, p.pool.halo, over_before, over_after, lane) & valid;
  masks.inside = widen(reach, p.pool.halo, reach_before, reach_after, lane) & valid & ~masks.above;
  return true;
}

// Protected tokens of a tile.
__device__ inline uint32_t protected_tokens(const RunProtection& guarded, const Source& source, int begin, int lane) {
  return guarded.any ? guarded.mask(begin + lane * 32) & mask_of(lane, 0, source.length - begin) : 0;
}

// Counts what is not finite among a lane's tokens, and of that what is not protected.
__device__ inline void count_broken(const Keys& keys, const RunProtection& guarded, int first_token, uint32_t& non_finite, uint32_t& forced) {
  if (keys.broken == 0) return;
  non_finite += __popc(keys.broken);
  forced += __popc(keys.broken & ~(guarded.any ? guarded.mask(first_token) : 0));
}

// The same masks by any rule and of any scores; forced tokens are above.
struct SlowTile {
  uint32_t above;
  uint32_t inside;
  uint32_t forced;
  uint32_t non_finite;         // of this lane's tokens
  uint32_t non_finite_forced;  // of them, not protected
};
__device__ __noinline__ SlowTile compare_slowly(const RankView& p, int segment, int begin, uint32_t low, uint32_t last, int lane, float* stage) {
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

// The key of a token that is not protected and whose score is finite.
__device__ inline uint32_t max_key_at(const PoolRule& rule, const Source& source, int token) {
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
#pragma unroll 1
  for (int d = -rule.halo; d <= rule.halo; ++d) {
    const int other = token + d;
    const float x = other >= 0 && other < length ? cleaned(own[other]) : absent_score();
    if (x == absent_score()) continue;
    sum = __fadd_rn(sum, x);
    ++neighbours;
  }
  return key_of(neighbours == 0 ? absent_score() : __fdiv_rn(sum, static_cast<float>(neighbours)));
}
__device__ inline uint32_t key_at(const PoolRule& rule, const Source& source, int token) {
  return rule.mean ? mean_key_at(rule, source.own, source.length, token) : max_key_at(rule, source, token);
}

// Masks of a tile whose candidates were too many to list; what is kept outside the ranking is above.
__device__ __noinline__ TileMasks compare_again(const RankView& p, int segment, int begin, uint32_t low, uint32_t last, int lane, float* stage) {
  TileMasks masks{};
  const Source source(p.scores, segment);
  if (p.pool.narrow() && compare_tile(p, source, begin, lane, low, last, masks)) {
    const uint32_t outside = protected_tokens(RunProtection(p.protection, segment, begin, begin + kTile), source, begin, lane);
    return {masks.above | outside, masks.inside & ~outside};
  }
  const SlowTile slow = compare_slowly(p, segment, begin, low, last, lane, stage);
  return {slow.above, slow.inside};
}

}  // namespace laprox::cuda
