#include <algorithm>
#include <cstdio>

#include "core/geometry.hpp"
#include "cuda/kernels/bound.cuh"
#include "cuda/kernels/candidates.cuh"
#include "cuda/launch/pruning.hpp"
#include "cuda/launch/value_norms.hpp"

namespace laprox::cuda {
namespace {

constexpr int kLists = 3;
// Of the budget: exact scores that prove a threshold. Where bounds are loose a third of them may be of entries that only seemed large; where they are
// tight a few more leave nothing for the second list (docs/gpu-notes.md).
constexpr double kProvingLoose = 1.5;
constexpr double kProvingTight = 1.9;

Text text_of(const char* sentence) {
  Text text{};
  std::snprintf(text.characters, sizeof text.characters, "%s", sentence);
  return text;
}

// What is known of it before lengths are.
const char* obstacle_of(const lpx_score_rule& rule, const lpx_select_rule& select, double worthwhile_budget) {
  if (select.exhaustive != 0) return "";
  if (rule.statistic != LPX_JOINT && rule.statistic != LPX_BOUND) return "no bound for this statistic";
  if (select.pooling == LPX_POOL_MEAN && select.pooling_width > 1) return "mean pooling needs every score";
  if (select.budget == LPX_BUDGET_RATIO && select.ratio > worthwhile_budget) return "the budget is large";
  return nullptr;
}

}  // namespace

struct Pruning::Bounds {
  float* norms = nullptr;     // [segments][stride], of layers whose caches keep none; or null
  int32_t* tokens = nullptr;  // [segments][stride]
  // Zero before the first list, in one piece.
  PruneCounts* total = nullptr;
  int32_t* counts = nullptr;  // [lists][segments]
  int32_t zero_words = 0;
  int32_t* first_tiles = nullptr;  // [segments + 1]
};

Pruning::~Pruning() = default;

Pruning::Pruning(Arena& arena, const Geometry& shape, lpx_dtype cache, lpx_dtype window, const lpx_score_rule& score_rule,
                 const DeviceFactors* factors, const lpx_select_rule& select_rule, const Known& known, Path path, const PruningSizes& sizes)
    : sizes_(sizes),
      obstacle_(obstacle_of(score_rule, select_rule, sizes.worthwhile_budget)),
      cache_(cache),
      proving_(known.log_sums ? kProvingTight : kProvingLoose),
      tightens_(!known.log_sums && int64_t{shape.segments} * shape.max_length >= sizes.worthwhile_tightening),
      factors_(factors) {
  row_bytes_ = static_cast<int64_t>(element_size(cache)) * shape.head_dim;
  const int64_t slots = int64_t{shape.segments} * shape.stride;
  scores_ = arena.take<float>(slots);
  if (shape.rows > 0) attention_ = std::make_unique<Attention>(arena, shape, cache, window, known, obstacle_ == nullptr, path);
  exact_ = std::make_unique<Exact>(arena, shape, cache, window, score_rule, factors, attention_.get(), path);
  if (obstacle_ != nullptr) {
    select_ = std::make_unique<Select>(arena, view(shape), select_rule, sizes.select);
    return;
  }
  bounds_ = std::make_unique<Bounds>();
  // Candidates are listed and scored before the selection lists its own.
  Arena unused;
  Arena measured;
  const Select measure(unused, view(shape), select_rule, sizes.select, &measured);
  const int64_t shared_bytes = std::max(measured.bytes(), slots * 4);
  char* shared = arena.take<char>(shared_bytes);
  bounds_->tokens = reinterpret_cast<int32_t*>(shared);
  Arena lists = shared == nullptr ? Arena() : Arena(shared, shared_bytes);
  select_ = std::make_unique<Select>(arena, view(shape), select_rule, sizes.select, &lists);
  if (!known.norms) bounds_->norms = arena.take<float>(slots);
  const int64_t header = (static_cast<int64_t>(sizeof(PruneCounts)) + 3) / 4;
  bounds_->zero_words = static_cast<int32_t>(header + kLists * int64_t{shape.segments});
  auto* zeros = arena.take<int32_t>(bounds_->zero_words);
  bounds_->total = reinterpret_cast<PruneCounts*>(zeros);
  if (zeros != nullptr) bounds_->counts = zeros + header;
  bounds_->first_tiles = arena.take<int32_t>(int64_t{shape.segments} + 1);
}

ScoreView Pruning::view(const Geometry& g) const {
  ScoreView scores{};
  scores.data = scores_;
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

void Pruning::prune(const Launch& launch, const Geometry& g) const {
  const Bounds& own = *bounds_;
  const ScoreView scores = view(g);
  const auto grid = [&](int each) { return static_cast<unsigned>(std::min<int64_t>(int64_t{launch.multiprocessors} * each, select_->max_tiles())); };

  if (own.norms != nullptr) value_norms(launch, g, cache_, own.norms);
  BoundView bound = {g,
                     select_->tile_start(),
                     attention_->roots(),
                     attention_->panels(),
                     attention_->ranges(),
                     attention_->inflation(),
                     factors_->singular(),
                     own.norms,
                     scores_,
                     reinterpret_cast<uint32_t*>(own.total),
                     own.zero_words};
  const int heads = attention_->panel_heads();
  const auto find_bounds = heads == 1   ? laprox::cuda::find_bounds<1>
                           : heads == 2 ? laprox::cuda::find_bounds<2>
                           : heads == 3 ? laprox::cuda::find_bounds<3>
                                        : laprox::cuda::find_bounds<4>;
  launch.run("bounds", find_bounds, grid(kBoundBlocks), kBoundThreads, 0, bound);

  CandidateView lists{};
  lists.lengths = g.lengths;
  lists.stride = g.stride;
  lists.segments = g.segments;
  lists.status = g.status;
  lists.tile_start = select_->tile_start();
  lists.scores = scores_;
  lists.parts = select_->parts();
  lists.cuts = select_->cuts();
  lists.floor_cuts = select_->floor_cuts();
  lists.tokens = own.tokens;
  lists.total = own.total;
  lists.tightens = tightens_ && attention_->tightens();
  lists.zeros = select_->zeros();
  lists.zero_words = select_->zero_words();
  lists.worthwhile_budget = sizes_.worthwhile_budget;
  lists.worthwhile_candidates = sizes_.worthwhile_candidates;
  const auto list = [&](auto kernel, int32_t* counts, int32_t* first_tiles, int tile) {
    lists.counts = counts;
    lists.first_tiles = first_tiles;
    lists.tile = tile;
    launch.run("candidates", kernel, grid(kListBlocks), kListThreadsOfTiles, 0, lists);
  };

  // Of the largest bounds as many as the budget, pooled: so many finite scores prove a threshold whatever they are.
  select_->cut_bounds(launch, scores, proving_);
  list(list_candidates<List::kFirst>, own.counts, own.first_tiles, exact_->tile());
  const Candidates first{own.tokens, own.counts, own.first_tiles, nullptr};
  exact_->run(launch, g, &first, scores_);

  select_->lower_bounds(launch, scores);
  if (lists.tightens) {
    int32_t* const loose = own.counts + g.segments;
    list(list_candidates<List::kLoose>, loose, attention_->first_tile(), kScanTile);
    if (!attention_->tighten(launch, g, own.tokens, loose, {factors_->singular(), nullptr, own.norms}, scores_)) {
      bound.inflation = attention_->exact_inflation();
      const dim3 blocks(32, static_cast<unsigned>(std::min(g.segments, 65535)));
      launch.run("bounds", tighten_bounds, blocks, kBoundThreads, 0, bound, own.tokens, loose, heads);
    }
  }
  const Candidates second{own.tokens, own.counts + 2 * int64_t{g.segments}, own.first_tiles, &own.total->rest};
  list(list_candidates<List::kSecond>, own.counts + 2 * int64_t{g.segments}, own.first_tiles, exact_->tile());
  exact_->run(launch, g, &second, scores_);
}

void Pruning::run(const Launch& launch, const Geometry& g, const lpx_selection& out, lpx_report* report) const {
  const ScoreView scores = view(g);
  const bool sampled = attention_ != nullptr && attention_->sample(launch, g);
  select_->find_budgets(launch, scores, sampled);
  if (sampled) {
    exact_->pack(launch, g);
    attention_->scan(launch, g, exact_->packed());
  }
  if (bounds_ != nullptr)
    prune(launch, g);
  else
    exact_->run(launch, g, nullptr, scores_);
  const ScoresReport how = {false, bounds_ == nullptr ? nullptr : bounds_->total, text_of(obstacle_ == nullptr ? "" : obstacle_)};
  select_->select(launch, scores, bounds_ != nullptr, out, report, how);
}

}  // namespace laprox::cuda
