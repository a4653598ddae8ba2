#include <algorithm>
#include <cstdio>

#include "core/geometry.hpp"
#include "cuda/kernels/bound.cuh"
#include "cuda/kernels/candidates.cuh"
#include "cuda/launch/pruning.hpp"

namespace laprox::cuda {
namespace {

constexpr int kListBlocks = 4;      // a multiprocessor
constexpr double kTightened = 1.6;  // of the budget: entries that get exact attention norms before any has an exact score
constexpr int kLists = 4;
constexpr double kProving = 1.06;  // of the budget: exact scores that prove a threshold, with room for the errors of two samples

Text text_of(const char* sentence) {
  Text text{};
  std::snprintf(text.characters, sizeof text.characters, "%s", sentence);
  return text;
}

// What is known of it before lengths are.
const char* obstacle_of(const lpx_score_rule& rule, const lpx_select_rule& select, double worthwhile_budget) {
  if (rule.statistic != LPX_JOINT && rule.statistic != LPX_BOUND) return "no bound for this statistic";
  if (select.pooling == LPX_POOL_MEAN && select.pooling_width > 1) return "mean pooling needs every score";
  if (select.budget == LPX_BUDGET_RATIO && select.ratio > worthwhile_budget) return "the budget is large";
  return nullptr;
}

}  // namespace

struct Pruning::Bounds {
  float* bounds = nullptr;    // [segments][stride]
  int32_t* tokens = nullptr;  // [segments][stride]
  float* first = nullptr;     // [segments]
  float* second = nullptr;    // [segments]
  // Zero at the start of a call, in one piece.
  PruneCounts* total = nullptr;
  int32_t* counts = nullptr;  // [lists][segments]
  int64_t zero_bytes = 0;
};

Pruning::~Pruning() = default;

Pruning::Pruning(Arena& arena, const Geometry& shape, lpx_dtype cache, lpx_dtype window, const lpx_score_rule& score_rule,
                 const DeviceFactors* factors, const lpx_select_rule& select_rule, Path path, const PruningSizes& sizes)
    : sizes_(sizes), obstacle_(obstacle_of(score_rule, select_rule, sizes.worthwhile_budget)), cache_(cache), factors_(factors) {
  row_bytes_ = static_cast<int64_t>(element_size(cache)) * shape.head_dim;
  scores_ = arena.take<float>(int64_t{shape.segments} * shape.stride);
  if (shape.rows > 0) attention_ = std::make_unique<Attention>(arena, shape, cache, window, obstacle_ == nullptr, path);
  exact_ = std::make_unique<Exact>(arena, shape, cache, window, score_rule, factors, path);
  if (obstacle_ != nullptr) {
    select_ = std::make_unique<Select>(arena, view(shape, nullptr), select_rule, sizes.select);
    return;
  }
  bounds_ = std::make_unique<Bounds>();
  // Candidates are listed and scored before the selection lists its own.
  Arena unused;
  Arena measured;
  const Select measure(unused, view(shape, nullptr), select_rule, sizes.select, &measured);
  const int64_t shared_bytes = std::max(measured.bytes(), int64_t{shape.segments} * shape.stride * 4);
  char* shared = arena.take<char>(shared_bytes);
  bounds_->tokens = reinterpret_cast<int32_t*>(shared);
  Arena lists = shared == nullptr ? Arena() : Arena(shared, shared_bytes);
  select_ = std::make_unique<Select>(arena, view(shape, nullptr), select_rule, sizes.select, &lists);
  bounds_->bounds = arena.take<float>(int64_t{shape.segments} * shape.stride);
  bounds_->first = arena.take<float>(shape.segments);
  bounds_->second = arena.take<float>(shape.segments);
  const int64_t header = (static_cast<int64_t>(sizeof(PruneCounts)) + 3) / 4;
  bounds_->zero_bytes = (header + kLists * int64_t{shape.segments}) * 4;
  auto* zeros = arena.take<int32_t>(header + kLists * int64_t{shape.segments});
  bounds_->total = reinterpret_cast<PruneCounts*>(zeros);
  if (zeros != nullptr) bounds_->counts = zeros + header;
  lpx_score_rule norms{};
  norms.size = sizeof norms;
  norms.statistic = LPX_FACTORED;
  norms.attention = LPX_ATTENTION_L2;
  norms.value = LPX_VALUE_NONE;
  norms.aggregation = LPX_AGGREGATE_SUM;
  norms_ = std::make_unique<Exact>(arena, shape, cache, window, norms, nullptr, path);
}

ScoreView Pruning::view(const Geometry& g, float* data) const {
  ScoreView scores{};
  scores.data = data;
  scores.stride = g.stride;
  scores.lengths = g.lengths;
  scores.contexts = g.contexts;
  scores.layer = g.layer;
  scores.layers = g.layers;
  scores.sequences = g.sequences;
  scores.kv_heads = g.kv_heads;
  scores.max_length = g.max_length;
  scores.bytes_per_entry = 2 * row_bytes_;
  scores.status = g.status;
  return scores;
}

void Pruning::prune(const Launch& launch, const Geometry& g, const lpx_selection& out, lpx_report* report) const {
  const Bounds& own = *bounds_;
  const ScoreView scores = view(g, scores_);
  check(cudaMemsetAsync(own.total, 0, static_cast<size_t>(own.zero_bytes), launch.stream), "pruning");

  const BoundView bound = {g,
                           select_->tile_start(),
                           attention_->squares(),
                           attention_->inflation(),
                           factors_->singular(),
                           static_cast<int32_t>(row_bytes_),
                           own.bounds,
                           scores_};
  const auto grid = [&](int each) { return static_cast<unsigned>(std::min<int64_t>(int64_t{launch.multiprocessors} * each, select_->max_tiles())); };
  find_bounds<float, true><<<grid(kBoundBlocks), kBoundThreads, 0, launch.stream>>>(bound);
  launch.check("bounds");
  switch (cache_) {
    case LPX_F32: find_bounds<float, false><<<grid(kBoundBlocks), kBoundThreads, 0, launch.stream>>>(bound); break;
    case LPX_F16: find_bounds<__half, false><<<grid(kBoundBlocks), kBoundThreads, 0, launch.stream>>>(bound); break;
    case LPX_BF16: find_bounds<__nv_bfloat16, false><<<grid(kBoundBlocks), kBoundThreads, 0, launch.stream>>>(bound); break;
  }
  launch.check("bounds");

  const ScoreView bounds = view(g, own.bounds);
  CandidateView lists{};
  lists.lengths = g.lengths;
  lists.stride = g.stride;
  lists.segments = g.segments;
  lists.status = g.status;
  lists.layer = g.layer;
  lists.layer_segments = g.sequences * g.kv_heads;
  lists.tile_start = select_->tile_start();
  lists.bounds = own.bounds;
  lists.parts = select_->parts();
  lists.cuts = select_->cuts();
  lists.floor_cuts = select_->floor_cuts();
  lists.first = own.first;
  lists.second = own.second;
  lists.tokens = own.tokens;
  lists.total = own.total;
  lists.worthwhile_budget = sizes_.worthwhile_budget;
  lists.worthwhile_candidates = sizes_.worthwhile_candidates;
  const auto list = [&](auto kernel, int index) {
    lists.counts = own.counts + int64_t{index} * g.segments;
    kernel<<<grid(kListBlocks), kListThreadsOfTiles, 0, launch.stream>>>(lists);
    launch.check("candidates");
    return Candidates{own.tokens, lists.counts};
  };
  const auto tighten = [&](const Candidates& only) {
    norms_->run(launch, g, attention_->log_sums(), &only, scores_);
    const dim3 blocks(8, static_cast<unsigned>(std::min(g.segments, 65535)));
    switch (cache_) {
      case LPX_F32: tighten_bounds<float><<<blocks, kBoundThreads, 0, launch.stream>>>(bound, only.tokens, only.counts); break;
      case LPX_F16: tighten_bounds<__half><<<blocks, kBoundThreads, 0, launch.stream>>>(bound, only.tokens, only.counts); break;
      case LPX_BF16: tighten_bounds<__nv_bfloat16><<<blocks, kBoundThreads, 0, launch.stream>>>(bound, only.tokens, only.counts); break;
    }
    launch.check("bounds");
  };

  select_->cut_bounds(launch, bounds, kTightened, false);
  tighten(list(list_candidates<List::kRough>, 0));
  // Of the largest bounds as many as the budget, pooled: so many finite scores prove a threshold whatever they are.
  select_->reset(launch);
  select_->cut_bounds(launch, bounds, kProving, true);
  const Candidates first = list(list_candidates<List::kFirst>, 1);
  exact_->run(launch, g, attention_->log_sums(), &first, scores_);

  select_->reset(launch);
  select_->lower_bounds(launch, scores);
  tighten(list(list_candidates<List::kLoose>, 2));
  const Candidates second = list(list_candidates<List::kSecond>, 3);
  list(list_candidates<List::kRest>, 3);
  exact_->run(launch, g, attention_->log_sums(), &second, scores_);
  select_->reset(launch);
  select_->select(launch, scores, true, out, report, false);
}

void Pruning::run(const Launch& launch, const Geometry& g, const lpx_selection& out, lpx_report* report) const {
  if (attention_ != nullptr) attention_->run(launch, g);
  const ScoreView scores = view(g, scores_);
  select_->find_budgets(launch, scores);
  if (bounds_ != nullptr) {
    prune(launch, g, out, report);
  } else {
    exact_->run(launch, g, attention_ == nullptr ? nullptr : attention_->log_sums(), nullptr, scores_);
    select_->select(launch, scores, false, out, report, false);
  }
  if (report == nullptr) return;
  report_pruning<<<1, 1, 0, launch.stream>>>(g.status, bounds_ == nullptr ? nullptr : bounds_->total, text_of("the budget is large"),
                                             text_of(obstacle_ == nullptr ? "" : obstacle_), report);
  launch.check("report");
}

}  // namespace laprox::cuda
