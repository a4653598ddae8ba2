#include <algorithm>

#include "cuda/kernels/budget.cuh"
#include "cuda/kernels/select.cuh"
#include "cuda/launch/select.hpp"

namespace laprox::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 2;

// Sinks and pinned ranges are both ranges of positions.
std::vector<PositionRange> merged_ranges(const lpx_select_rule& rule) {
  std::vector<PositionRange> ranges;
  if (rule.sinks > 0) ranges.push_back({0, rule.sinks});
  for (int i = 0; i < rule.pinned_count; ++i)
    if (rule.pinned[i].begin < rule.pinned[i].end) ranges.push_back({rule.pinned[i].begin, rule.pinned[i].end});
  std::sort(ranges.begin(), ranges.end(), [](PositionRange a, PositionRange b) { return a.begin < b.begin; });
  std::vector<PositionRange> merged;
  for (const PositionRange range : ranges) {
    if (!merged.empty() && range.begin <= merged.back().end)
      merged.back().end = std::max(merged.back().end, range.end);
    else
      merged.push_back(range);
  }
  return merged;
}

constexpr int64_t kStages = int64_t{kRankWarps} * kStage * 4;

template <typename Kernel>
void launch_rank(const Launch& launch, Kernel kernel, int64_t blocks, int64_t shared, const RankPass& pass) {
  launch.run("select", kernel, static_cast<unsigned>(blocks), kRankThreads, shared, pass);
}

}  // namespace

Select::Select(Arena& arena, const ScoreView& shape, const lpx_select_rule& rule, const SelectSizes& sizes, Arena* lists)
    : rule_(rule), sizes_(sizes), ranges_(merged_ranges(rule)), segments_(int64_t{shape.layers} * shape.sequences * shape.kv_heads) {
  if (rule_.pooling == LPX_POOL_NONE) rule_.pooling_width = 1;
  rule_.pinned = nullptr;
  rule_.pinned_count = 0;
  const int64_t tiles_each = ceil_div(std::max(shape.max_length, 1), kTile);
  max_tiles_ = segments_ * tiles_each;
  if (segments_ >= INT32_MAX || max_tiles_ >= INT32_MAX || int64_t{shape.layers} * shape.kv_heads * shape.max_length >= INT64_C(1) << 32)
    fail(LPX_UNSUPPORTED, "%lld segments of up to %d tokens: a sequence may have fewer than 2^32 entries", static_cast<long long>(segments_),
         shape.max_length);

  parts_.scope = rule.scope;
  parts_.layers = shape.layers;
  parts_.sequences = shape.sequences;
  parts_.kv_heads = shape.kv_heads;
  const int64_t parts = parts_.count();
  parts_.entries = arena.take<int64_t>(parts);
  parts_.guarded = arena.take<int64_t>(parts);
  parts_.quota = arena.take<int64_t>(parts);
  parts_.remainder = arena.take<int64_t>(parts);
  parts_.tiles = arena.take<int32_t>(parts);
  bounds_ = arena.take<int32_t>(segments_ * (1 + 2 * static_cast<int64_t>(ranges_.size())));
  if (ranges_.size() > kInlineRanges) device_ranges_ = arena.take<PositionRange>(static_cast<int64_t>(ranges_.size()));
  tile_start_ = arena.take<int32_t>(segments_ + 1);

  const int64_t searched = floors() ? segments_ : parts;
  const auto fits = [&](int bits) { return (searched << bits) * 4 <= sizes.histogram_bytes; };
  first_bits_ = fits(kMostBits) ? kMostBits : fits(11) ? 11 : 8;
  bits_ = std::min(first_bits_, 11);
  sample_ = first_bits_ == kMostBits && !floors();

  histogram_words_ = searched << first_bits_;
  histogram_ = arena.take<uint32_t>(histogram_words_);
  const int passes = passes_left() + 4;
  // One block of words to be cleared: counters of tiles done, of non-finite scores, of entries granted to floors.
  zero_words_ = 2 * parts + 2 + (passes + 6) * parts + (floors() ? (passes + 6) * segments_ : 0);
  zeros_ = arena.take<uint32_t>(zero_words_);
  uint32_t* next = zeros_;
  const auto zeros = [&](int64_t count) {
    uint32_t* taken = next;
    if (next != nullptr) next += count;
    return taken;
  };
  granted_ = reinterpret_cast<unsigned long long*>(zeros(2 * parts));
  blocks_done_ = zeros(2);
  const auto search = [&](Ranks& ranks, int64_t count) {
    ranks.target = arena.take<int64_t>(count);
    ranks.left = arena.take<int64_t>(count);
    ranks.low = arena.take<uint32_t>(count);
    ranks.last = arena.take<uint32_t>(count);
    ranks.key = arena.take<uint32_t>(count);
    ranks.ties = arena.take<int64_t>(count);
    ranks.histogram = histogram_;
    ranks.stride = arena.take<int32_t>(count);
    ranks.done = zeros(passes * count);
    ranks.above = zeros(count);
    ranks.inside = zeros(count);
    ranks.forced = zeros(count);
    ranks.non_finite = zeros(count);
    ranks.failed = zeros(count);
    ranks.failures = blocks_done_ == nullptr ? nullptr : blocks_done_ + 1;
  };
  search(ranks_, parts);
  if (floors()) {
    heads_ = parts_;
    heads_.scope = LPX_SCOPE_HEAD;
    heads_.tiles = arena.take<int32_t>(segments_);
    search(head_ranks_, segments_);
  }

  Arena& own = lists == nullptr ? arena : *lists;
  collected_.slots = sizes.slots;
  collected_.kept = own.take<uint32_t>(max_tiles_ * kTileWords);
  collected_.candidate = own.take<uint2>(max_tiles_ * sizes.slots);
  collected_.count = own.take<int32_t>(max_tiles_);
  tile_above_ = arena.take<int32_t>(max_tiles_);
  tile_ties_ = arena.take<int32_t>(max_tiles_);
  tile_segment_ = arena.take<int32_t>(max_tiles_);
  segment_above_ = arena.take<int32_t>(segments_);
  segment_ties_ = arena.take<int32_t>(segments_);
  tie_quota_ = arena.take<int32_t>(segments_);
}

void Select::find_budgets(const Launch& launch, const ScoreView& scores) const {
  BudgetRule budget{};
  budget.budget = rule_.budget;
  budget.ratio = rule_.ratio;
  budget.amount = rule_.budget == LPX_BUDGET_BYTES ? rule_.amount / std::max<int64_t>(scores.bytes_per_entry, 1) : rule_.amount;
  budget.pyramid_beta = rule_.pyramid_beta;
  budget.recent = rule_.recent;
  budget.ranges = static_cast<int32_t>(ranges_.size());
  if (ranges_.size() <= kInlineRanges) {
    std::copy(ranges_.begin(), ranges_.end(), budget.inline_range);
  } else {
    for (size_t first = 0; first < ranges_.size(); first += RangeChunk::kSize) {
      RangeChunk chunk;
      const size_t count = std::min<size_t>(RangeChunk::kSize, ranges_.size() - first);
      std::copy_n(ranges_.begin() + static_cast<int64_t>(first), count, chunk.range);
      launch.run("protected ranges", store_ranges, 1, RangeChunk::kSize, 0, chunk, static_cast<int>(count), device_ranges_ + first);
    }
    budget.range = device_ranges_;
  }
  const SearchStart start = {ranks_.stride, sample_, sizes_.sampled, heads_.tiles, zeros_, zero_words_, histogram_, histogram_words_};
  launch.run("budgets", laprox::cuda::find_budgets, static_cast<unsigned>(scores.sequences + 1 + kZeroBlocks), kBudgetThreads, 0, scores, budget,
             parts_, start, bounds_, tile_start_);
}

RankPass Select::pass(const ScoreView& scores) const {
  RankPass pass{};
  pass.scores = scores;
  pass.tile_start = tile_start_;
  pass.protection = {bounds_, static_cast<int32_t>(ranges_.size())};
  pass.pool = {rule_.pooling == LPX_POOL_MEAN && rule_.pooling_width > 1, rule_.pooling_width / 2};
  pass.parts = parts_;
  pass.ranked = parts_;
  pass.ranks = ranks_;
  pass.targets = ranks_.target;
  pass.granted = granted_;
  pass.refuse_non_finite = rule_.non_finite == LPX_NON_FINITE_ERROR;
  pass.deviations = sizes_.deviations;
  pass.collected = collected_;
  return pass;
}

void Select::find_range(const Launch& launch, RankPass& pass) const {
  pass.bits = pass.goal == Goal::kContinue ? bits_ : first_bits_;
  const int64_t blocks = std::min<int64_t>(int64_t{launch.multiprocessors} * kBlocksPerMultiprocessor, max_tiles_);
  const bool shuffled = !pass.pool.mean && pass.pool.halo <= kShuffled;
  const int64_t shared = (int64_t{4} << pass.bits) + (shuffled ? 0 : kStages);
  switch (shuffled ? pass.pool.halo : -1) {
    case 0: launch_rank(launch, laprox::cuda::find_range<0>, blocks, shared, pass); break;
    case 1: launch_rank(launch, laprox::cuda::find_range<1>, blocks, shared, pass); break;
    case 2: launch_rank(launch, laprox::cuda::find_range<2>, blocks, shared, pass); break;
    case 3: launch_rank(launch, laprox::cuda::find_range<3>, blocks, shared, pass); break;
    default: launch_rank(launch, laprox::cuda::find_range<-1>, blocks, shared, pass); break;
  }
  pass.goal = Goal::kContinue;
  ++pass.index;
}

void Select::collect(const Launch& launch, RankPass& pass) const {
  pass.bits = bits_;
  const int64_t blocks = std::min<int64_t>(int64_t{launch.multiprocessors} * kBlocksPerMultiprocessor, max_tiles_);
  launch_rank(launch, laprox::cuda::collect, blocks, (int64_t{4} << bits_) + kStages, pass);
  pass.goal = Goal::kContinue;
  ++pass.index;
}

void Select::refine(const Launch& launch, RankPass& pass) const {
  pass.bits = bits_;
  const int64_t blocks = std::min<int64_t>(launch.multiprocessors, max_tiles_);
  launch_rank(launch, laprox::cuda::refine, blocks, (int64_t{4} << bits_) + kStages, pass);
  ++pass.index;
}

void Select::cut_bounds(const Launch& launch, const ScoreView& bounds, double share) const {
  RankPass pass = this->pass(bounds);
  pass.bounds = true;
  pass.goal = Goal::kShare;
  pass.share = share;
  find_range(launch, pass);
  if (!floors()) return;
  pass.ranked = heads_;
  pass.ranks = head_ranks_;
  pass.index = 0;
  pass.goal = Goal::kFloorShare;
  pass.share = rule_.floor;
  find_range(launch, pass);
}

void Select::lower_bounds(const Launch& launch, const ScoreView& scores) const {
  RankPass pass = this->pass(scores);
  pass.goal = Goal::kSample;
  pass.share = 1;
  find_range(launch, pass);
  pass.goal = Goal::kProve;
  pass.count = true;
  collect(launch, pass);
  if (!floors()) return;
  pass.count = false;
  pass.ranked = heads_;
  pass.ranks = head_ranks_;
  pass.index = 0;
  pass.goal = Goal::kFloor;
  pass.share = rule_.floor;
  find_range(launch, pass);
}

void Select::select(const Launch& launch, const ScoreView& scores, const lpx_selection& out, lpx_report* report, const ScoresReport& how) const {
  RankPass pass = this->pass(scores);
  if (floors()) {
    pass.goal = Goal::kExact;
    pass.count = true;
    find_range(launch, pass);  // what is left to rank, once non-finite scores are counted
    pass.count = false;
    RankPass floor = pass;
    floor.ranked = heads_;
    floor.ranks = head_ranks_;
    floor.index = 0;
    floor.goal = Goal::kFloor;
    floor.share = rule_.floor;
    for (int i = 0; i <= passes_left(); ++i) find_range(launch, floor);
    pass.floor_key = head_ranks_.key;
    pass.floor_ties = head_ranks_.ties;
    pass.goal = Goal::kRest;
    find_range(launch, pass);
    collect(launch, pass);
  } else {
    pass.goal = Goal::kSample;
    find_range(launch, pass);
    pass.goal = Goal::kBudget;
    pass.count = true;
    collect(launch, pass);
    pass.count = false;
    pass.again = true;
    pass.goal = Goal::kTarget;
    find_range(launch, pass);
    collect(launch, pass);
    pass.again = false;
  }
  for (int i = 1; i < passes_left(); ++i) refine(launch, pass);

  const Counts counts = {tile_above_, tile_ties_, tile_segment_, segment_above_, segment_ties_, tie_quota_, blocks_done_};
  const SelectionView view = {out.tokens, out.capacity, out.offsets};
  launch.run("select", count_kept, static_cast<unsigned>(std::min<int64_t>(segments_, int64_t{launch.multiprocessors} * 8)), kRankThreads, 0, pass,
             counts, view, report, how);
  launch.run("select", emit, static_cast<unsigned>(std::min<int64_t>(ceil_div(max_tiles_, kEmitThreads / 32), int64_t{launch.multiprocessors} * 24)),
             kEmitThreads, 0, pass, counts, view);
}

void Select::run(const Launch& launch, const ScoreView& scores, const lpx_selection& out, lpx_report* report) const {
  find_budgets(launch, scores);
  select(launch, scores, out, report, {.given = true});
}

}  // namespace laprox::cuda
