// Which tokens are protected and how many entries each part keeps, from lengths that only the device knows.
//
//   quota = floor(ratio * entries of the part), or the part's share of a number of entries by length, remainders to the
//   largest fractions and then to the smaller (layer, head); as a pyramid where that is asked for.
//
// One block a sequence, one more to number the tiles. Everything is integers (and single roundings of doubles): the same as
// native/core/budget.cpp, to the entry. Reads lengths and, where there are positions, log2(n) of them for each bound.
#pragma once

#include "cuda/kernels/blocks.cuh"
#include "cuda/kernels/select_views.cuh"

namespace laprox::cuda {

inline constexpr int kBudgetThreads = 1024;

struct BudgetRule {
  int32_t budget;  // lpx_budget
  double ratio;
  int64_t amount;  // entries of a sequence
  double pyramid_beta;
  int32_t recent;
  int32_t ranges;  // sinks and pinned positions, merged
  PositionRange inline_range[kInlineRanges];
  const PositionRange* range;  // where there are more
};

// What a search needs to begin with.
struct SearchStart {
  int32_t* stride;      // [parts]
  bool sample;          // whether large parts are sampled
  int64_t sampled;      // entries above the threshold that a sample should have
  int32_t* head_tiles;  // [segments] or null
  uint32_t* zeros;      // to be cleared
  int64_t zero_words;
  uint32_t* histogram;  // likewise
  int64_t histogram_words;
};

inline constexpr int kMaxSampleStride = 64;
inline constexpr int kZeroBlocks = 32;

struct RangeChunk {
  static constexpr int kSize = 1024;
  PositionRange range[kSize];
};

// Kernel parameters are the one way from the host that needs no memory to outlive the call.
__global__ void store_ranges(RangeChunk chunk, int count, PositionRange* to) {
  follow_previous();
  if (static_cast<int>(threadIdx.x) < count) to[threadIdx.x] = chunk.range[threadIdx.x];
}

// The first token at or after a position.
__device__ inline int token_at(const ScoreView& scores, int segment, int length, int64_t position) {
  if (!scores.has_positions(segment)) return static_cast<int>(min(max(position, int64_t{0}), int64_t{length}));
  int low = 0;
  int high = length;
  if (scores.positions != nullptr) {
    const int32_t* own = scores.positions + scores.offset(segment);
#pragma unroll 1
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (own[middle] < position)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  const LayerView& layer = scores.layer[scores.layer_of(segment)];
  const Rows rows(layer, layer.position, scores.sequence_of(segment), scores.head_of(segment));
#pragma unroll 1
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (*reinterpret_cast<const int32_t*>(rows(middle)) < position)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Adds up to `amount` to the quotas: one each in turn, in order (from the end where `sign` is -1), to parts with room.
template <typename Room>
__device__ void deal(const Parts& parts, int first, int count, int64_t amount, int sign, Room&& room, int64_t* scratch) {
  const auto index = [&](int i) { return parts.segment(first, i); };  // parts of a pyramid are segments
  int64_t most = 0;
  int64_t all = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) all += room(index(i));
  all = block_sum(all, scratch);
  most = amount;  // full turns
  if (all > amount) {
    int64_t low = 0;
#pragma unroll 1
    for (int64_t high = amount; low < high;) {
      const int64_t turns = low + (high - low + 1) / 2;
      int64_t sum = 0;
#pragma unroll 1
      for (int i = threadIdx.x; i < count; i += blockDim.x) sum += min(room(index(i)), turns);
      sum = block_sum(sum, scratch);
      if (sum <= amount)
        low = turns;
      else
        high = turns - 1;
    }
    most = low;
  }
  int64_t dealt = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t own = room(index(i));
    parts.remainder[index(i)] = own;
    dealt += min(own, most);
  }
  const int64_t rest = amount - block_sum(dealt, scratch);
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int64_t own = parts.remainder[index(i)];
    int64_t more = min(own, most);
    if (own > most && rest > 0) {
      int64_t before = 0;
      if (sign > 0)
#pragma unroll 1
        for (int j = 0; j < i; ++j) before += parts.remainder[index(j)] > most;
      else
#pragma unroll 1
        for (int j = i + 1; j < count; ++j) before += parts.remainder[index(j)] > most;
      more += before < rest;
    }
    parts.quota[index(i)] += sign * more;
  }
  __syncthreads();
}

__device__ inline void find_budgets_of_block(const ScoreView& scores, const BudgetRule& rule, const Parts& parts, const SearchStart& start,
                                             int32_t* bounds, int32_t* tile_start) {
  if (*scores.status != LPX_OK) return;
  __shared__ int64_t scratch[32];
  const int tid = threadIdx.x;
  const int sequence = blockIdx.x;
  if (sequence > scores.sequences) {
    const int64_t first = int64_t{sequence - scores.sequences - 1} * blockDim.x + tid;
    const int64_t step = int64_t{gridDim.x - scores.sequences - 1} * blockDim.x;
#pragma unroll 1
    for (int64_t i = first; i < start.zero_words; i += step) start.zeros[i] = 0;
#pragma unroll 1
    for (int64_t i = first; i < start.histogram_words; i += step) start.histogram[i] = 0;
    return;
  }
  if (sequence == scores.sequences) {  // number the tiles
    number_all(
        scores.segments(),
        [&](int segment) {
          const int tiles = (scores.length(segment) + kTile - 1) / kTile;
          if (start.head_tiles != nullptr) start.head_tiles[segment] = tiles;
          return tiles;
        },
        tile_start);
    return;
  }

  const int per_sequence = scores.layers * scores.kv_heads;
  const int count = parts.count() / parts.sequences;
  const auto segment_at = [&](int i) { return (i / scores.kv_heads * scores.sequences + sequence) * scores.kv_heads + i % scores.kv_heads; };
  const auto part_at = [&](int i) {
    return parts.scope == LPX_SCOPE_MODEL ? sequence : parts.scope == LPX_SCOPE_LAYER ? i * scores.sequences + sequence : segment_at(i);
  };
#pragma unroll 1
  for (int i = tid; i < count; i += blockDim.x) {
    const int part = part_at(i);
    parts.entries[part] = 0;
    parts.guarded[part] = 0;
    parts.tiles[part] = 0;
  }
  const int bounds_each = 1 + 2 * rule.ranges;
#pragma unroll 1
  for (int64_t item = tid; item < int64_t{per_sequence} * bounds_each; item += blockDim.x) {
    const int segment = segment_at(static_cast<int>(item / bounds_each));
    const int which = static_cast<int>(item % bounds_each);
    const int length = scores.length(segment);
    int64_t position = 0;
    if (which == 0) {
      position = int64_t{scores.has_positions(segment) ? scores.contexts[segment] : length} - rule.recent;
    } else {
      const PositionRange range = rule.ranges <= kInlineRanges ? rule.inline_range[(which - 1) / 2] : rule.range[(which - 1) / 2];
      position = which % 2 == 1 ? range.begin : range.end;
    }
    bounds[int64_t{segment} * bounds_each + which] = token_at(scores, segment, length, position);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = tid; i < per_sequence; i += blockDim.x) {
    const int segment = segment_at(i);
    const int part = parts.of(segment);
    const int length = scores.length(segment);
    const int32_t* own = bounds + int64_t{segment} * bounds_each;
    int64_t guarded = length - own[0];
#pragma unroll 1
    for (int r = 0; r < rule.ranges; ++r) guarded += max(min(own[2 + 2 * r], own[0]) - own[1 + 2 * r], 0);
    atomicAdd(reinterpret_cast<unsigned long long*>(parts.entries + part), static_cast<unsigned long long>(length));
    atomicAdd(reinterpret_cast<unsigned long long*>(parts.guarded + part), static_cast<unsigned long long>(guarded));
    atomicAdd(parts.tiles + part, (length + kTile - 1) / kTile);
  }
  __syncthreads();

  if (rule.budget == LPX_BUDGET_RATIO) {
#pragma unroll 1
    for (int i = tid; i < count; i += blockDim.x)
      parts.quota[part_at(i)] = static_cast<int64_t>(floor(__dmul_rn(rule.ratio, static_cast<double>(parts.entries[part_at(i)]))));
  } else {
    int64_t entries = 0;
#pragma unroll 1
    for (int i = tid; i < count; i += blockDim.x) entries += parts.entries[part_at(i)];
    entries = block_sum(entries, scratch);
    if (rule.amount >= entries) {
#pragma unroll 1
      for (int i = tid; i < count; i += blockDim.x) parts.quota[part_at(i)] = parts.entries[part_at(i)];
    } else {
      int64_t given = 0;
#pragma unroll 1
      for (int i = tid; i < count; i += blockDim.x) {
        const int part = part_at(i);
        const auto product = static_cast<unsigned __int128>(rule.amount) * static_cast<unsigned __int128>(parts.entries[part]);
        const auto share = static_cast<int64_t>(product / static_cast<unsigned __int128>(entries));
        parts.quota[part] = share;
        parts.remainder[part] = static_cast<int64_t>(product - static_cast<unsigned __int128>(share) * static_cast<unsigned __int128>(entries));
        given += share;
      }
      const int64_t left = rule.amount - block_sum(given, scratch);
#pragma unroll 1
      for (int i = tid; i < count && left > 0; i += blockDim.x) {
        const int64_t own = parts.remainder[part_at(i)];
        int64_t rank = 0;
#pragma unroll 1
        for (int j = 0; j < count; ++j) {
          const int64_t other = parts.remainder[part_at(j)];
          rank += other > own || (other == own && j < i);
        }
        if (rank < left) ++parts.quota[part_at(i)];
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = tid; i < count; i += blockDim.x)
    if (parts.quota[part_at(i)] < parts.guarded[part_at(i)]) report_status(scores.status, LPX_BUDGET_TOO_SMALL);
#pragma unroll 1
  for (int i = tid; i < count; i += blockDim.x) {
    int stride = 1;
#pragma unroll 1
    while (start.sample && stride < kMaxSampleStride && parts.quota[part_at(i)] - parts.guarded[part_at(i)] >= start.sampled * 2 * stride)
      stride *= 2;
    start.stride[part_at(i)] = stride;
  }
  if (rule.pyramid_beta == 0) return;

  // PyramidKV: unprotected budgets fall linearly from the first layer to the last. See native/core/budget.cpp.
  int64_t missing = 0;
#pragma unroll 1
  for (int i = tid; i < count; i += blockDim.x) {
    const int part = part_at(i);
    const double slope = scores.layers == 1 ? 0.5 : __ddiv_rn(scores.layer_of(part), scores.layers - 1);
    const double factor = __dsub_rn(__dsub_rn(2, __ddiv_rn(1, rule.pyramid_beta)), __dmul_rn(slope, __dsub_rn(2, __ddiv_rn(2, rule.pyramid_beta))));
    const int64_t even = parts.quota[part];
    const int64_t guarded = parts.guarded[part];
    const int64_t own = guarded + static_cast<int64_t>(floor(__dmul_rn(static_cast<double>(even - guarded), factor)));
    parts.quota[part] = min(own, parts.entries[part]);
    missing += even - parts.quota[part];
  }
  missing = block_sum(missing, scratch);
  Parts model = parts;  // numbers this sequence's segments in order
  model.scope = LPX_SCOPE_MODEL;
  if (missing > 0) deal(model, sequence, count, missing, 1, [&](int part) { return parts.entries[part] - parts.quota[part]; }, scratch);
  if (missing < 0) deal(model, sequence, count, -missing, -1, [&](int part) { return parts.quota[part] - parts.guarded[part]; }, scratch);
}

// `beside`: while the kernel before it works, which leads (kernels/views.cuh).
__global__ void __launch_bounds__(kBudgetThreads)
    find_budgets(const __grid_constant__ ScoreView scores, const __grid_constant__ BudgetRule rule, const __grid_constant__ Parts parts,
                 const __grid_constant__ SearchStart start, int32_t* bounds, int32_t* tile_start, bool beside) {
  accompany_previous(beside);
  find_budgets_of_block(scores, rule, parts, start, bounds, tile_start);
  wait_for_previous();
}

}  // namespace laprox::cuda
