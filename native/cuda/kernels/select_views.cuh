// What the kernels of a selection share: the scores, which of them compete for one budget, and what is known of each rank so far.
//
// A tile is kTile consecutive tokens of one segment, and the work of one warp. Tiles are numbered segment by segment, so that
// every kernel can deal them out evenly whatever the lengths are.
#pragma once

#include <cstdint>

#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

inline constexpr int kTile = 1024;
inline constexpr int kRun = 128;                         // tokens of a warp, four of each lane
inline constexpr int kTileWords = kTile / 32;            // of a bit mask of a tile
inline constexpr uint32_t kForced = 0xffffffffu;         // the key of what is kept outside the ranking
inline constexpr uint32_t kMinusInfinity = 0xff800000u;  // the bits of what ranks below every score
inline constexpr int kInlineRanges = 16;                 // protected ranges that travel as a kernel parameter
inline constexpr int kNarrow = 31;                       // neighbours on each side that masks are widened by

// Scores of all segments. Those of segment x start at data + offsets[x], or at data + x * stride where offsets is null.
struct ScoreView {
  float* data;
  int64_t stride;
  const int32_t* lengths;    // [segments]
  const int32_t* contexts;   // [segments]: position of the next token. Read only where there are positions.
  const int32_t* positions;  // laid out as data; null: see layer
  const LayerView* layer;    // positions from a cache's planes, where it has any; null: the index in the segment
  int32_t layers;
  int32_t sequences;
  int32_t kv_heads;
  int32_t max_length;
  int64_t bytes_per_entry;
  int32_t* status;
  const int64_t* offsets;  // [segments] or null

  __host__ __device__ int segments() const { return layers * sequences * kv_heads; }
  __device__ int layer_of(int segment) const { return segment / (sequences * kv_heads); }
  __device__ int sequence_of(int segment) const { return segment / kv_heads % sequences; }
  __device__ int head_of(int segment) const { return segment % kv_heads; }
  __device__ int length(int segment) const { return min(max(lengths[segment], 0), max_length); }
  __device__ int64_t offset(int segment) const { return offsets == nullptr ? segment * stride : offsets[segment]; }
  __device__ bool has_positions(int segment) const {
    return positions != nullptr || (layer != nullptr && layer[layer_of(segment)].position.data != nullptr);
  }
};

// Positions [begin, end).
struct PositionRange {
  int32_t begin;
  int32_t end;
};

// Protected tokens of each segment: its last ones from `recent` on, and `ranges` disjoint, ascending ranges.
struct Protection {
  const int32_t* bounds;  // [segments][1 + 2 * ranges]: recent, then begin and end of each range
  int32_t ranges;

  __device__ const int32_t* of(int segment) const { return bounds + int64_t{segment} * (1 + 2 * ranges); }
};

// Entries that compete for one budget: a sequence, a layer of it, or a head of a layer.
struct Parts {
  int32_t scope;  // lpx_scope
  int32_t layers;
  int32_t sequences;
  int32_t kv_heads;
  int64_t* entries;    // [parts]
  int64_t* guarded;    // [parts]: protected entries
  int64_t* quota;      // [parts]: entries kept, protected ones included
  int64_t* remainder;  // [parts] scratch of the shares
  int32_t* tiles;      // [parts]

  __host__ __device__ int count() const { return sequences * (scope == LPX_SCOPE_MODEL ? 1 : scope == LPX_SCOPE_LAYER ? layers : layers * kv_heads); }
  __host__ __device__ int of(int segment) const {
    return scope == LPX_SCOPE_MODEL ? segment / kv_heads % sequences : scope == LPX_SCOPE_LAYER ? segment / kv_heads : segment;
  }
  __host__ __device__ int segments_each() const { return scope == LPX_SCOPE_MODEL ? layers * kv_heads : scope == LPX_SCOPE_LAYER ? kv_heads : 1; }
  // Segment i of a part, in the order of (layer, head).
  __host__ __device__ int segment(int part, int i) const {
    return scope == LPX_SCOPE_MODEL   ? (i / kv_heads * sequences + part) * kv_heads + i % kv_heads
           : scope == LPX_SCOPE_LAYER ? part * kv_heads + i
                                      : part;
  }
};

// The search for a key in each part: the one that `left` keys in [low, last] reach, counted from above.
struct Ranks {
  int64_t* target;      // [parts]: entries to be chosen by rank
  int64_t* left;        // [parts]
  uint32_t* low;        // [parts]
  uint32_t* last;       // [parts], inclusive
  uint32_t* key;        // [parts]: the threshold, once the range is one key
  int64_t* ties;        // [parts]: entries of just this key that are kept
  int32_t* stride;      // [parts]: one of so many runs of 128 tokens is in the sample
  uint32_t* histogram;  // [parts][bins]
  // Zero before a search.
  uint32_t* done;        // [passes][parts]: tiles that are counted
  uint32_t* above;       // [parts]: keys above the range
  uint32_t* inside;      // [parts]: keys in it, where only their number is wanted
  uint32_t* forced;      // [parts]: non-finite scores that are not protected
  uint32_t* non_finite;  // [parts]: non-finite scores
  uint32_t* failed;      // [parts]: the sample's range does not hold the threshold
  uint32_t* failures;    // how many
};

// What a pass over the scores leaves for those that follow.
struct Collected {
  uint32_t* kept;    // [tiles][kTileWords]: above every candidate. Bit b of word w is token 32 * w + b.
  uint2* candidate;  // [tiles][slots]: key, token in the tile; any order
  int32_t* count;    // [tiles]: candidates; more than there are slots: read them from the scores
  int32_t slots;
};

struct PoolRule {
  int32_t mean;  // or the maximum
  int32_t halo;  // neighbours on each side

  __host__ __device__ bool narrow() const { return !mean && halo <= kNarrow; }
};

// Parts that each have a key to be found.
struct Search {
  Parts parts;
  Ranks ranks;
};
inline constexpr int kOfRule = 0;   // the parts of the rule
inline constexpr int kOfHeads = 1;  // every segment for itself: floors

// What the passes of a selection read and write.
struct RankView {
  ScoreView scores;
  const int32_t* tile_start;  // [segments + 1]
  Protection protection;
  PoolRule pool;
  bool bounds;  // scores are negated upper bounds: their magnitudes are ranked, and nothing is kept outside the ranking
  bool refuse_non_finite;
  float deviations;  // of a sample that a range allows for
  Search search[2];
  unsigned long long* granted;  // [parts of the rule]: entries that floors took
  Collected collected;

  __device__ const Parts& parts() const { return search[kOfRule].parts; }
};

// What a pass looks for, or goes on with.
enum class Goal {
  kSample,      // about what the budget leaves beside protected entries; the range is wide enough for a sample's error
  kSampleLow,   // the same, to be low enough for kProve; the range's upper end leaves room for what the threshold becomes then
  kExact,       // what the budget leaves beside protected and non-finite entries
  kBudget,      // the same, in a range that a sample gave, of these scores or (kSampleLow) of fewer
  kTarget,      // the target that is there
  kFloor,       // of a head: its share of the target, times `share`
  kRest,        // what the floors left
  kShare,       // about `share` of the budget, protected entries included; a few more rather than fewer
  kFloorShare,  // of a head: its protected entries, and `share` of the rest of the budget
  kProve,       // whether the keys from the range's low end on are as many as the budget leaves
  kContinue     // in the range that was found
};

// One pass of all blocks. They wait for each other before the next one.
struct Pass {
  enum class Kind { kFindRange, kCollect, kRefine, kCount, kEmit };
  Kind kind;
  Goal goal;
  double share;
  int32_t search;  // kOfRule, kOfHeads
  int32_t index;   // among the passes of a search
  int32_t bits;    // of the histogram
  bool again;      // only for parts whose sample failed
  bool count;      // non-finite scores
  bool unsampled;  // all keys where a sample would do
  bool floored;    // floors took keys above their heads', and so many of just these as their heads' ties say

  // A range of keys is found, and no key.
  __device__ bool ranges() const { return goal == Goal::kSample || goal == Goal::kSampleLow || goal == Goal::kShare; }
  __device__ int stride(const Ranks& ranks, int part) const { return ranges() && !unsampled ? ranks.stride[part] : 1; }
  __device__ bool first() const { return goal != Goal::kContinue && goal != Goal::kBudget && goal != Goal::kProve; }
};

__device__ inline uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f));  // -0 becomes 0
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ inline float score_of(uint32_t key) {
  if (key >= 0xff800000u) return __uint_as_float(0x7f800000u);
  if (key <= 0x007fffffu) return __uint_as_float(kMinusInfinity);
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// What a finite score is above just where its key is above `key`. Never -0, whose key no score has.
__device__ inline float limit_of(uint32_t key) { return score_of(key == 0x7fffffffu ? key - 1 : key); }

__device__ inline float component(float4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
__device__ inline bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
__device__ inline float absent_score() { return __uint_as_float(kMinusInfinity); }

// From runs to neighbours: lane l has bit 4 * r + i for token 128 * r + 4 * l + i; afterwards bit b of lane w is token 32 * w + b.
// Eight by eight groups of four bits among eight lanes, by halves, and then the words to their lanes.
__device__ inline uint32_t gathered(uint32_t runs, int lane) {
  uint32_t other = __shfl_xor_sync(~0u, runs, 4);
  runs = lane & 4 ? __byte_perm(other, runs, 0x7632) : __byte_perm(runs, other, 0x5410);
  other = __shfl_xor_sync(~0u, runs, 2);
  runs = lane & 2 ? __byte_perm(other, runs, 0x7351) : __byte_perm(runs, other, 0x6240);
  other = __shfl_xor_sync(~0u, runs, 1);
  runs = lane & 1 ? (other >> 4 & 0x0f0f0f0fu) | (runs & 0xf0f0f0f0u) : (runs & 0x0f0f0f0fu) | (other << 4 & 0xf0f0f0f0u);
  return __shfl_sync(~0u, runs, lane % 4 * 8 + lane / 4);
}

// Bits [from, until) of a word.
__device__ inline uint32_t bits_between(int from, int until) {
  from = min(max(from, 0), 32);
  until = min(max(until, 0), 32);
  return from >= until ? 0 : (~0u >> (32 - until + from)) << from;
}

// Bits of a lane's word whose tokens are in [begin, end) of the tile.
__device__ inline uint32_t mask_of(int lane, int begin, int end) { return bits_between(begin - lane * 32, end - lane * 32); }

// Bit i: number i, finite, is above `limit`, which is not -0. By the sign of the difference: additions have twice as many lanes as comparisons and
// bit operations.
__device__ inline uint32_t above(const float4 (&numbers)[8], float limit) {
  uint32_t half[2] = {0, 0};
#pragma unroll
  for (int i = 15; i >= 0; --i)
#pragma unroll
    for (int h = 0; h < 2; ++h) half[h] = __funnelshift_l(__float_as_uint(__fsub_rn(limit, component(numbers[4 * h + i / 4], i % 4))), half[h], 1);
  return half[1] << 16 | half[0];
}

// Tokens of a mask, a word a lane, as a list of a warp in shared memory. Returns how many there are. Word by word or token by token of a lane,
// whichever has fewer rounds: tokens that were pooled lie together.
__device__ inline int list_tokens(uint32_t word, int lane, uint16_t* list) {
  const int own = __popc(word);
  int before = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  const int total = __shfl_sync(~0u, before, 31);
  before -= own;
  uint32_t words = __ballot_sync(~0u, word != 0);
  __syncwarp();
  if (__popc(words) < static_cast<int>(__reduce_max_sync(~0u, static_cast<unsigned>(own)))) {
#pragma unroll 1
    for (; words != 0; words &= words - 1) {
      const int w = __ffs(static_cast<int>(words)) - 1;
      const uint32_t tokens = __shfl_sync(~0u, word, w);
      const int at = __shfl_sync(~0u, before, w) + __popc(tokens & ((1u << lane) - 1));
      if (tokens >> lane & 1) list[at] = static_cast<uint16_t>(w * 32 + lane);
    }
  } else {
#pragma unroll 1
    for (; word != 0; word &= word - 1) list[before++] = static_cast<uint16_t>(lane * 32 + __ffs(static_cast<int>(word)) - 1);
  }
  __syncwarp();
  return total;
}

}  // namespace laprox::cuda
