#include <algorithm>

#include "cuda/kernels/budget.cuh"
#include "cuda/kernels/select.cuh"
#include "cuda/launch/select.hpp"

namespace laprox::cuda {
namespace {

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

constexpr int64_t kFewTiles = 8192;

}  // namespace

// The passes of one launch, in order.
struct Select::Plan {
  const Select& select;
  Passes passes{};
  int32_t searched[2] = {};  // passes of each search

  Pass& add(Pass::Kind kind, Goal goal, int bits, int search) {
    Pass& pass = passes.pass[passes.count++];
    pass.kind = kind;
    pass.goal = goal;
    pass.search = search;
    pass.index = searched[search]++;
    pass.bits = bits;
    passes.bits = std::max(passes.bits, bits);
    return pass;
  }
  Pass& find_range(Goal goal, int search = kOfRule) {
    return add(Pass::Kind::kFindRange, goal, goal == Goal::kContinue ? select.bits_ : select.first_bits_, search);
  }
  Pass& collect(Goal goal) { return add(Pass::Kind::kCollect, goal, select.bits_, kOfRule); }
  // The exact thresholds, and what they keep.
  void finish(bool floored) {
    for (int i = 1; i < select.passes_left(); ++i) add(Pass::Kind::kRefine, Goal::kContinue, select.bits_, kOfRule).floored = floored;
    add(Pass::Kind::kCount, Goal::kContinue, 0, kOfRule).floored = floored;
    add(Pass::Kind::kEmit, Goal::kContinue, 0, kOfRule).floored = floored;
  }
};

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

void Select::find_budgets(const Launch& launch, const ScoreView& scores, bool beside) const {
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
    beside = false;
  }
  const SearchStart start = {ranks_.stride, sample_, sizes_.sampled, heads_.tiles, zeros_, zero_words_, histogram_, histogram_words_};
  launch.run("budgets", laprox::cuda::find_budgets, static_cast<unsigned>(scores.sequences + 1 + kZeroBlocks), kBudgetThreads, 0, scores, budget,
             parts_, start, bounds_, tile_start_, beside);
}

RankView Select::view(const ScoreView& scores) const {
  RankView view{};
  view.scores = scores;
  view.tile_start = tile_start_;
  view.protection = {bounds_, static_cast<int32_t>(ranges_.size())};
  view.pool = {rule_.pooling == LPX_POOL_MEAN && rule_.pooling_width > 1, rule_.pooling_width / 2};
  view.refuse_non_finite = rule_.non_finite == LPX_NON_FINITE_ERROR;
  view.deviations = sizes_.deviations;
  view.search[kOfRule] = {parts_, ranks_};
  view.search[kOfHeads] = {heads_, head_ranks_};
  view.granted = granted_;
  view.collected = collected_;
  return view;
}

void Select::run(const Launch& launch, const RankView& view, const Plan& plan, const SelectionView& out, lpx_report* report,
                 const ScoresReport& how) const {
  const Counts counts = {tile_above_, tile_ties_, tile_segment_, segment_above_, segment_ties_, tie_quota_, blocks_done_};
  const int64_t shared = (int64_t{4} << plan.passes.bits) + int64_t{kRankWarps} * kStage * 4;
  launch.run_together("select", select_entries, max_tiles_, kRankThreads, shared, view, plan.passes, counts, out, report, how);
}

void Select::cut_bounds(const Launch& launch, const ScoreView& bounds, double share) const {
  RankView view = this->view(bounds);
  view.bounds = true;
  Plan plan{*this};
  plan.find_range(Goal::kShare).share = share;
  if (floors()) plan.find_range(Goal::kFloorShare, kOfHeads).share = rule_.floor;
  run(launch, view, plan, {}, nullptr, {});
}

void Select::lower_bounds(const Launch& launch, const ScoreView& scores) const {
  Plan plan{*this};
  // What a sample says has to be proved; in few scores all are counted sooner.
  const bool few = !floors() && max_tiles_ <= kFewTiles;
  plan.find_range(Goal::kSampleLow).unsampled = few;
  if (!few) plan.collect(Goal::kProve).count = true;
  if (floors()) plan.find_range(Goal::kFloor, kOfHeads).share = rule_.floor;
  run(launch, view(scores), plan, {}, nullptr, {});
}

void Select::select(const Launch& launch, const ScoreView& scores, bool ranged, const lpx_selection& out, lpx_report* report,
                    const ScoresReport& how) const {
  Plan plan{*this};
  if (floors()) {
    plan.find_range(Goal::kExact).count = true;  // what is left to rank, once non-finite scores are counted
    plan.find_range(Goal::kFloor, kOfHeads).share = rule_.floor;
    for (int i = 0; i < passes_left(); ++i) plan.find_range(Goal::kContinue, kOfHeads);
    plan.find_range(Goal::kRest).floored = true;
    plan.collect(Goal::kContinue).floored = true;
  } else {
    if (!ranged || first_bits_ < kMostBits) plan.find_range(Goal::kSample);
    plan.collect(Goal::kBudget).count = true;
    plan.find_range(Goal::kTarget).again = true;
    plan.collect(Goal::kContinue).again = true;
  }
  plan.finish(floors());
  run(launch, view(scores), plan, {out.tokens, out.capacity, out.offsets}, report, how);
}

void Select::run(const Launch& launch, const ScoreView& scores, const lpx_selection& out, lpx_report* report) const {
  find_budgets(launch, scores, false);
  select(launch, scores, false, out, report, {.given = true});
}

}  // namespace laprox::cuda
