// From thresholds to kept tokens.
//
//   kept(t) = key(t) > T, or key(t) = T and fewer than `ties` entries of T before it in (layer, head, token)
//
//   count_kept   the mask of each tile, kept entries before it in its segment, shares of the ties, offsets of the segments
//   emit         the kept tokens, ascending
// Bytes: what collect left, once each; 4 bytes a kept entry.
#pragma once

#include "cuda/kernels/rank.cuh"
#include "cuda/kernels/report.cuh"

namespace laprox::cuda {

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

struct SelectionView {
  int32_t* tokens;
  int64_t capacity;
  int64_t* offsets;
};

// The threshold of a segment: that of its part, or of its floor where it is lower.
__device__ inline uint32_t threshold_of(const RankView& p, const Pass& pass, int segment) {
  return min(p.search[kOfRule].ranks.key[p.parts().of(segment)], floor_key_of(p, pass, segment));
}

// What is left in `count` of a tile once it is counted: candidates in the lower half, those of just the threshold in the upper one.
__device__ inline int32_t with_ties(int listed, int ties) { return listed | ties << 16; }
__device__ inline int listed_in(int32_t count) { return count & 0xffff; }
__device__ inline int ties_in(int32_t count) { return count >> 16; }

// Ends the masks of a segment's tiles, and counts in them. By a block, eight tiles of a warp at a time.
__device__ inline void count_segment(const RankView& p, const Pass& pass, const Counts& counts, int segment, int64_t* scratch) {
  constexpr int kTogether = kRankWarps * 8;
  __shared__ int64_t tile_counts[kTogether];  // entries above; ties in the upper half: of a segment neither reaches 2^31
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float* const stage = stage_of(warp);
  auto* const words = reinterpret_cast<uint32_t*>(stage);  // [8][kTileWords] above, then likewise of just the threshold
  const uint32_t threshold = threshold_of(p, pass, segment);
  const int first = p.tile_start[segment];
  const int end = p.tile_start[segment + 1];
  int64_t so_far = 0;
#pragma unroll 1
  for (int chunk = first; chunk < end; chunk += kTogether) {
    const int group = chunk + warp * 8;
    if (group < end) {
      const int tile = group + lane / 4;  // four lanes each
      const bool there = tile < end;
      const int listed = there ? p.collected.count[tile] : 0;
      uint4* const kept = reinterpret_cast<uint4*>(p.collected.kept + int64_t{there ? tile : first} * kTileWords) + lane % 4 * 2;
      const uint4 none = {0, 0, 0, 0};
      uint4* const above_words = reinterpret_cast<uint4*>(words) + lane * 2;
      uint4* const tie_words = above_words + 8 * kTileWords / 4;
      __syncwarp();
      above_words[0] = there ? kept[0] : none;
      above_words[1] = there ? kept[1] : none;
      tie_words[0] = none;
      tie_words[1] = none;
      __syncwarp();
      for_each_listed(p, group, end, lane, [&](int k, uint2 candidate) {
        if (candidate.x >= threshold)
          atomicOr(words + ((candidate.x == threshold ? 8 : 0) + k) * kTileWords + candidate.y / 32, 1u << (candidate.y % 32));
      });
      __syncwarp();
      const uint4 a = above_words[0];
      const uint4 b = above_words[1];
      const uint4 c = tie_words[0];
      const uint4 d = tie_words[1];
      const auto bits = [](uint4 x) { return __popc(x.x) + __popc(x.y) + __popc(x.z) + __popc(x.w); };
      int above = bits(a) + bits(b);
      int ties = bits(c) + bits(d);
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        above += __shfl_xor_sync(~0u, above, step);
        ties += __shfl_xor_sync(~0u, ties, step);
      }
      const bool too_many = listed > p.collected.slots;
      if (listed > 0 && !too_many) {
        kept[0] = a;
        kept[1] = b;
      }
      uint32_t long_ones = __ballot_sync(~0u, too_many && lane % 4 == 0);
#pragma unroll 1
      for (; long_ones != 0; long_ones &= long_ones - 1) {
        const int k = (__ffs(static_cast<int>(long_ones)) - 1) / 4;
        const TileMasks masks = compare_again(p, segment, (group + k - first) * kTile, threshold, threshold, lane, stage);
        p.collected.kept[int64_t{group + k} * kTileWords + lane] = masks.above;
        const int all_above = __reduce_add_sync(~0u, __popc(masks.above));
        const int all_ties = __reduce_add_sync(~0u, __popc(masks.inside));
        if (lane / 4 == k) {
          above = all_above;
          ties = all_ties;
        }
      }
      if (there && lane % 4 == 0) {
        tile_counts[tile - chunk] = int64_t{ties} << 32 | above;
        p.collected.count[tile] = with_ties(listed, ties);
      }
    }
    __syncthreads();
    const int tile = chunk + static_cast<int>(threadIdx.x);
    const bool own = static_cast<int>(threadIdx.x) < kTogether && tile < end;
    const Prefix prefix = block_prefix(own ? tile_counts[threadIdx.x] : 0, scratch);
    if (own) {
      const int64_t before = so_far + prefix.before;
      counts.above[tile] = static_cast<int32_t>(before & 0xffffffff);
      counts.ties[tile] = static_cast<int32_t>(before >> 32);
      counts.segment[tile] = segment;
    }
    so_far += prefix.total;
  }
  if (threadIdx.x == 0) {
    counts.segment_above[segment] = static_cast<int32_t>(so_far & 0xffffffff);
    counts.segment_ties[segment] = static_cast<int32_t>(so_far >> 32);
  }
}

// One block a segment; the last one shares the ties, finds the offsets and reports.
__device__ inline void count_kept(const RankView& p, const Pass& pass, const Counts& counts, const SelectionView& out, lpx_report* report,
                                  const ScoresReport& how) {
  __shared__ int64_t scratch[32];
  const int segments = p.scores.segments();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
  for (int segment = static_cast<int>(blockIdx.x); segment < segments; segment += static_cast<int>(gridDim.x)) {
    count_segment(p, pass, counts, segment, scratch);
  }
  if (!last_to_arrive(counts.done, gridDim.x)) return;

  // Ties go to the smaller (layer, head, token): of a segment's, `own` are kept by its floor, and `ranked` compete for what the part has left.
  struct Ties {
    int64_t own;
    int64_t ranked;
  };
  const auto shares_of = [&](int segment, uint32_t key) {
    const int64_t all = __ldcg(counts.segment_ties + segment);
    if (!pass.floored || all == 0) return Ties{0, all};
    const uint32_t floor_key = p.search[kOfHeads].ranks.key[segment];
    const int64_t own = floor_key <= key ? p.search[kOfHeads].ranks.ties[segment] : 0;
    return Ties{own, floor_key >= key ? all - own : 0};
  };
  const Parts& parts = p.parts();
  const Ranks& ranks = p.search[kOfRule].ranks;
  const int count = parts.count();
  const int each = parts.segments_each();
  // Of the only part, mostly.
  const uint32_t only_key = ranks.key[0];
  const int64_t only_left = ranks.ties[0];
  int64_t entries = parts.entries[0];
  int64_t guarded = parts.guarded[0];
  int64_t non_finite = ranks.non_finite[0];
#pragma unroll 1
  for (int part = warp; part < count && count > 1; part += kRankWarps) {
    const uint32_t key = ranks.key[part];
    int64_t left = ranks.ties[part];
#pragma unroll 1
    for (int first = 0; first < each; first += 32) {
      const int i = first + lane;
      const int segment = i < each ? parts.segment(part, i) : 0;
      const Ties ties = i < each ? shares_of(segment, key) : Ties{0, 0};
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
#pragma unroll 1
  for (int first = 0; first < segments; first += kRankThreads) {
    const int segment = first + static_cast<int>(threadIdx.x);
    int64_t kept = segment < segments ? __ldcg(counts.segment_above + segment) : 0;
    if (count == 1) {  // segments in order
      const Ties ties = segment < segments ? shares_of(segment, only_key) : Ties{0, 0};
      const Prefix ranked = block_prefix(ties.ranked, scratch);
      const int64_t before = ties_before + ranked.before;
      const int64_t given = ties.own + min(ties.ranked, max(only_left - before, int64_t{0}));
      if (segment < segments) counts.quota[segment] = static_cast<int32_t>(given);
      kept += given;
      ties_before += ranked.total;
    } else if (segment < segments) {
      kept += counts.quota[segment];
    }
    const Prefix prefix = block_prefix(kept, scratch);
    if (segment < segments) out.offsets[segment] = carry + prefix.before;
    carry += prefix.total;
  }
  if (threadIdx.x == 0) out.offsets[segments] = carry;
  const bool fits = carry <= out.capacity;
  __syncthreads();
  if (!fits) {
#pragma unroll 1
    for (int i = threadIdx.x; i <= segments; i += kRankThreads) out.offsets[i] = 0;
    if (threadIdx.x == 0) report_status(p.scores.status, LPX_OUT_OF_BOUNDS);
  }
  if (report == nullptr) return;
  if (count > 1) {
    entries = guarded = non_finite = 0;
#pragma unroll 1
    for (int part = threadIdx.x; part < count; part += kRankThreads) {
      entries += parts.entries[part];
      guarded += parts.guarded[part];
      non_finite += ranks.non_finite[part];
    }
    entries = block_sum(entries, scratch);
    guarded = block_sum(guarded, scratch);
    non_finite = block_sum(non_finite, scratch);
  }
  if (threadIdx.x != 0) return;
  report_scores(how, entries, *report);
  report->entries = entries;
  report->kept = fits ? carry : 0;
  report->protected_entries = guarded;
  report->non_finite = non_finite;
}

// Of a tile's entries of just the threshold the first `allowed`.
__device__ __noinline__ uint32_t kept_ties(const RankView& p, const Pass& pass, int tile, int segment, int first_token, int allowed) {
  const int listed = listed_in(p.collected.count[tile]);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float* const stage = stage_of(static_cast<int>(threadIdx.x) / 32);
  const uint32_t threshold = threshold_of(p, pass, segment);
  uint32_t ties = 0;
  if (listed > p.collected.slots) {
    ties = compare_again(p, segment, first_token, threshold, threshold, lane, stage).inside;
  } else {
    auto* const words = reinterpret_cast<uint32_t*>(stage);
    __syncwarp();
    words[lane] = 0;
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < listed; i += 32) {
      const uint2 candidate = p.collected.candidate[int64_t{tile} * p.collected.slots + i];
      if (candidate.x == threshold) atomicOr(words + candidate.y / 32, 1u << (candidate.y % 32));
    }
    __syncwarp();
    ties = words[lane];
  }
  const int own = __popc(ties);
  int before = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  const int from_here = min(max(allowed - (before - own), 0), own);  // the first ones of this lane
#pragma unroll 1
  for (int drop = own - from_here; drop > 0; --drop) ties &= ~(0x80000000u >> __clz(static_cast<int>(ties)));
  return ties;
}

// Up to 32 tiles of a warp at a time: a lane finds out where one of them goes.
__device__ inline void emit(const RankView& p, const Pass& pass, const Counts& counts, const SelectionView& out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int tiles = p.tile_start[p.scores.segments()];
  const int warps = static_cast<int>(gridDim.x) * kRankWarps;
  auto* const list = reinterpret_cast<uint16_t*>(stage_of(warp));
  const int together = min((tiles + warps - 1) / warps, 32);
#pragma unroll 1
  for (int first = (static_cast<int>(blockIdx.x) * kRankWarps + warp) * together; first < tiles; first += warps * together) {
    const uint32_t* words = p.collected.kept + int64_t{first} * kTileWords + lane;
    uint32_t next = words[0];
    const int tile = min(first + lane, tiles - 1);
    const int segment = counts.segment[tile];
    const int count = p.collected.count[tile];
    const int ties_before = counts.ties[tile];
    const int quota = counts.quota[segment];
    const int64_t at = out.offsets[segment] + counts.above[tile] + min(ties_before, quota);
    const int first_token = (tile - p.tile_start[segment]) * kTile;
    const int allowed = ties_in(count) > 0 ? max(quota - ties_before, 0) : 0;
#pragma unroll 1
    for (int k = 0; k < together && first + k < tiles; ++k) {
      uint32_t kept = next;
      words += kTileWords;
      if (k + 1 < together && first + k + 1 < tiles) next = *words;
      const int own_first = __shfl_sync(~0u, first_token, k);
      const int own_allowed = __shfl_sync(~0u, allowed, k);
      int32_t* const to = out.tokens + __shfl_sync(~0u, at, k);
      if (own_allowed > 0) kept |= kept_ties(p, pass, first + k, __shfl_sync(~0u, segment, k), own_first, own_allowed);
      const int listed = list_tokens(kept, lane, list);
      for (int i = lane; i < listed; i += 32) to[i] = own_first + list[i];
      __syncwarp();
    }
  }
}

}  // namespace laprox::cuda
