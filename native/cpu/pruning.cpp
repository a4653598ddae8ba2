#include "cpu/pruning.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <mutex>

namespace laprox::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int32_t kCandidateBlock = 4096;   // tokens whose candidates share tiles
constexpr double kWorthwhileBudget = 0.25;  // of all entries: above, pruning is not tried
constexpr double kWorthwhileCandidates = 0.35;
constexpr double kTightened = 1.0;    // of the budget: bounds that are tightened before any entry is estimated
constexpr double kEnough = 1.05;      // of the budget: scores that prove a threshold whatever they are
constexpr int kWorthTightening = 12;  // attentions of an entry that its exact score costs
constexpr float kMargin = 1.001f;     // for rounding, of bounds from exact attention
constexpr float kUnderflow = 1e-18f;  // squares of attention below this vanish in float

// What estimates leave open of a threshold: `least` is the one by what scores are at least.
struct Doubt {
  float most = -kInfinity;  // that it can be
  float next = kInfinity;   // the smallest estimate above `least`
  int64_t reaching = 0;     // entries of `least` or less that may be above it; that with `least` is one
  void add(float score, float ceiling, float least) {
    if (score > least) {
      next = std::min(next, score);
    } else if (ceiling >= least) {
      most = std::max(most, ceiling);
      ++reaching;
    }
  }
  void join(const Doubt& other) {
    most = std::max(most, other.most);
    next = std::min(next, other.next);
    reaching += other.reaching;
  }
  bool any() const { return reaching > 1 || next <= most; }
};

// Whether a threshold is where it was, by the exact scores of the entries in doubt that were below it, just it, and above.
class Order {
 public:
  void add(float before, float least, float score) {
    (before < least ? below_ : before == least ? same_ : above_).add(score);
    lost_ = lost_ || !std::isfinite(score);
  }
  bool stands() const { return !lost_ && below_.most < same_.least && same_.least >= same_.most && same_.most < above_.least; }

 private:
  struct Span {
    float least = kInfinity;
    float most = -kInfinity;
    void add(float score) {
      least = std::min(least, score);
      most = std::max(most, score);
    }
  };
  Span below_;
  Span same_;
  Span above_;
  bool lost_ = false;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Pruning::Pruning(Workspace& workspace, const ScoreInputs& inputs, const ScoreLayout& layout, const lpx_select_rule& rule, const Kernels& kernels,
                 int threads)
    : inputs_(inputs),
      layout_(layout),
      rule_(rule),
      kernels_(kernels),
      scoring_(workspace, inputs, kernels, threads, true),
      ranking_(workspace, layout, rule, kernels, threads),
      scores_(workspace.take<float>(layout.entries())),
      ceilings_(workspace.take<float>(layout.entries())),
      norms_(workspace.take<float>(layout.entries())),
      bounds_(workspace.take<uint32_t>(layout.entries())),
      tight_(workspace.take<bool>(layout.entries())) {}

const char* Pruning::obstacle(const std::vector<Part>& parts) const {
  if (rule_.exhaustive != 0) return "";
  if (inputs_.rule.statistic != LPX_JOINT && inputs_.rule.statistic != LPX_BOUND) return "no bound for this statistic";
  if (rule_.pooling == LPX_POOL_MEAN && rule_.pooling_width > 1) return "mean pooling needs every score";
  int64_t quota = 0;
  for (const Part& part : parts) quota += part.quota;
  if (static_cast<double>(quota) > kWorthwhileBudget * static_cast<double>(layout_.entries())) return "the budget is large";
  return nullptr;
}

float Pruning::weight(Segment s) const { return inputs_.rule.layer_weights == nullptr ? 1.0f : std::fabs(inputs_.rule.layer_weights[s.layer]); }

// What the scan found of a tile's values, or the cache keeps.
void Pruning::weigh_norms(int64_t segment, int32_t first, int count) {
  const Segment s = layout_.segments().at(segment);
  float* norms = norms_ + layout_.offset(segment) + first;
  if (inputs_.cache.has_value_norms(s.layer)) {
    const void* rows[kTile];
    inputs_.cache.value_norms(s).run(first, count, rows);
    for (int t = 0; t < count; ++t) norms[t] = *static_cast<const float*>(rows[t]);
  }
  for (int t = 0; t < count; ++t) norms[t] *= weight(s);
}

void Pruning::bound(int64_t segment, int32_t begin, int32_t end, const uint32_t* kept, Scratch& scratch) {
  const Attention& attention = scoring_.attention();
  const RowLayout& rows = attention.layout();
  const Segment s = layout_.segments().at(segment);
  const float* singular = static_cast<const CpuFactors&>(inputs_.factors).head(s.layer, s.head).singular.data();
  for (int t = 0; t < kTile; ++t) scratch.rows[t] = scratch.sums + t * rows.squares();
  for (int32_t first = begin; first < end; first += kTile) {
    const int count = std::min(kTile, end - first);
    const int64_t entry = layout_.offset(segment) + first;
    weigh_norms(segment, first, count);
    float norms[kTile] = {};
    float bounds[kTile];
    std::copy_n(norms_ + entry, count, norms);
    kernels_.square(kept + (first - begin) * int64_t{rows.kept()}, count, rows.chunks(), rows.vectors(), attention.weights(segment), scratch.sums);
    kernels_.load(LPX_F32, scratch.rows, count, rows.squares(), scratch.squares);
    kernels_.upper_bounds(scratch.squares, rows.squares(), singular, attention.heads(), rows.parts(), norms, bounds);
    for (int t = 0; t < count; ++t) bounds_[entry + t] = std::bit_cast<uint32_t>(bounds[t]);
    std::fill_n(scores_ + entry, count, -kInfinity);
    std::fill_n(tight_ + entry, count, false);
  }
}

// Entries that are kept anyway and have no ranked neighbour to pool with, `halo` tokens away or nearer: their scores matter to nobody, unless they
// are not finite, which somebody wants to be told.
void Pruning::pass_over_protected(int64_t segment, int halo) {
  const int32_t length = layout_.length(segment);
  for (const TokenRange range : layout_.protected_ranges(segment, rule_)) {
    const int32_t end = range.end == length ? length : range.end - halo;
    for (int32_t t = range.begin == 0 ? 0 : range.begin + halo; t < end; ++t) {
      uint32_t& bound = bounds_[layout_.offset(segment) + t];
      if (std::isfinite(std::bit_cast<float>(bound))) bound = 0;
    }
  }
}

template <typename Body>
void Pruning::for_each_above(int64_t segment, int32_t begin, uint32_t least, Body&& body) const {
  int32_t tokens[kCandidateBlock];
  const int64_t picked =
      kernels_.pick(bounds_ + layout_.offset(segment) + begin, std::min(kCandidateBlock, layout_.length(segment) - begin), least, UINT32_MAX, tokens);
  for (int64_t i = 0; i < picked; ++i) body(begin + tokens[i]);
}

template <typename Done, typename Body>
int64_t Pruning::for_each_from(Pool& pool, const Cuts& least, Progress& progress, Done&& done, Body&& body) {
  std::vector<std::pair<int64_t, int32_t>> tasks;
  for (int64_t segment = 0; segment < layout_.segments().count(); ++segment)
    for (int32_t first = 0; first < layout_.length(segment); first += kCandidateBlock) tasks.emplace_back(segment, first);
  std::atomic<int64_t> total{0};
  pool.run(static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    if (progress.cancelled()) return;
    const auto [segment, begin] = tasks[static_cast<size_t>(i)];
    int32_t tokens[kCandidateBlock];
    int count = 0;
    for_each_above(segment, begin, least[static_cast<size_t>(segment)], [&, own = segment](int32_t token) {
      tokens[count] = token;
      count += !done(own, layout_.offset(own) + token);
    });
    const Rows keys = inputs_.cache.keys(layout_.segments().at(segment));
    for (int first = 0; first < count; first += kTile) {
      const int behind = std::min(count, first + kTile);
      prefetch(keys, tokens + behind, std::min(kTile, count - behind), inputs_.cache.row_bytes());
      body(segment, tokens + first, std::min(kTile, count - first), scoring_.scratch(worker));
    }
    total.fetch_add(count, std::memory_order_relaxed);
    progress.advance(0);
  });
  progress.check();
  return total.load();
}

int64_t Pruning::tighten_from(Pool& pool, const Cuts& least, Progress& progress) {
  const auto done = [this](int64_t, int64_t entry) { return tight_[entry]; };
  return for_each_from(pool, least, progress, done, [&](int64_t segment, const int32_t* tokens, int count, Scratch& scratch) {
    float largest[kTile];
    scoring_.exact().largest_scores(segment, tokens, count, largest, scratch);
    for (int t = 0; t < count; ++t) {
      const int64_t entry = layout_.offset(segment) + tokens[t];
      const float tighter = norms_[entry] * largest[t] * kMargin + kUnderflow;
      if (tighter < std::bit_cast<float>(bounds_[entry])) bounds_[entry] = std::bit_cast<uint32_t>(tighter);
      tight_[entry] = true;
    }
  });
}

int64_t Pruning::estimate_from(Pool& pool, const Cuts& least, Progress& progress) {
  const auto done = [this](int64_t, int64_t entry) { return scores_[entry] != -kInfinity; };
  return for_each_from(pool, least, progress, done, [&](int64_t segment, const int32_t* tokens, int count, Scratch& scratch) {
    const float error = estimate_error(segment);
    if (std::isfinite(error))
      estimate(segment, tokens, count, error, scratch);
    else
      score(segment, tokens, count, scratch);
  });
}

float Pruning::estimate_error(int64_t segment) const {
  // A floor ranks by more thresholds than one.
  return inputs_.rule.statistic == LPX_JOINT && rule_.floor == 0 ? scoring_.exact().estimate_error(segment) : kInfinity;
}

void Pruning::estimate(int64_t segment, const int32_t* tokens, int count, float error, Scratch& scratch) {
  float estimates[kTile];
  int32_t beyond[kTile];  // tokens that float cannot hold an estimate of
  int beyond_count = 0;
  scoring_.exact().estimates(segment, tokens, count, estimates, scratch);
  for (int t = 0; t < count; ++t) {
    const int64_t entry = layout_.offset(segment) + tokens[t];
    const float bound = std::bit_cast<float>(bounds_[entry]);
    const float square = estimates[t] * estimates[t];
    const float slack = error * bound * bound + kUnderflow * kUnderflow;
    scores_[entry] = std::sqrt(std::max(square - slack, 0.0f));
    ceilings_[entry] = std::sqrt(square + slack);
    if (!std::isfinite(ceilings_[entry])) beyond[beyond_count++] = tokens[t];
  }
  if (beyond_count > 0) score(segment, beyond, beyond_count, scratch);
}

void Pruning::score(int64_t segment, const int32_t* tokens, int count, Scratch& scratch) {
  float exact[kTile];
  scoring_.exact().scores(segment, tokens, count, exact, scratch);
  for (int t = 0; t < count; ++t) {
    const int64_t entry = layout_.offset(segment) + tokens[t];
    scores_[entry] = exact[t];
    ceilings_[entry] = exact[t];
  }
  exact_scores_.fetch_add(count, std::memory_order_relaxed);
}

// The threshold of a part is not below `least`, the one by what scores are at least, and not above the largest ceiling of the entries that have
// `least` or less: were it above, each entry that reaches it would have more than `least` already, and there are not so many.
bool Pruning::settle(Pool& pool, const std::vector<Part>& parts, const Cuts& proven, Progress& progress) {
  const auto segments = static_cast<int64_t>(proven.size());
  std::vector<size_t> part_of(proven.size());
  bool estimated = false;
  for (size_t p = 0; p < parts.size(); ++p) {
    for (const int64_t segment : parts[p].segments) {
      part_of[static_cast<size_t>(segment)] = p;
      estimated = estimated || std::isfinite(estimate_error(segment));
    }
  }
  if (!estimated) return true;
  const auto part = [&](int64_t segment) { return part_of[static_cast<size_t>(segment)]; };
  const auto least = [&](int64_t segment) { return ranking_.lower_bound(part(segment), segment); };
  std::mutex mutex;
  std::vector<Doubt> doubts(parts.size());
  pool.run(segments, [&](int64_t segment, int) {
    Doubt own;
    for (int32_t begin = 0; begin < layout_.length(segment); begin += kCandidateBlock) {
      for_each_above(segment, begin, proven[static_cast<size_t>(segment)], [&](int32_t token) {
        const int64_t entry = layout_.offset(segment) + token;
        own.add(scores_[entry], ceilings_[entry], least(segment));
      });
    }
    const std::lock_guard<std::mutex> lock(mutex);
    doubts[part(segment)].join(own);
  });
  Cuts open(proven.size(), UINT32_MAX);
  for (int64_t segment = 0; segment < segments; ++segment)
    if (doubts[part(segment)].any()) open[static_cast<size_t>(segment)] = proven[static_cast<size_t>(segment)];
  if (std::none_of(doubts.begin(), doubts.end(), [](const Doubt& doubt) { return doubt.any(); })) return true;

  const auto certain = [&](int64_t segment, int64_t entry) {
    return scores_[entry] > doubts[part(segment)].most || ceilings_[entry] < least(segment);
  };
  std::vector<Order> orders(parts.size());
  for_each_from(pool, open, progress, certain, [&](int64_t segment, const int32_t* tokens, int count, Scratch& scratch) {
    float before[kTile];
    const float* scores = scores_ + layout_.offset(segment);
    for (int t = 0; t < count; ++t) before[t] = scores[tokens[t]];
    score(segment, tokens, count, scratch);
    const std::lock_guard<std::mutex> lock(mutex);
    for (int t = 0; t < count; ++t) orders[part(segment)].add(before[t], least(segment), scores[tokens[t]]);
  });
  return std::all_of(orders.begin(), orders.end(), [](const Order& order) { return order.stands(); });
}

// By the multiply-adds of both. There is nothing to gain with one query head, or where heads are not joined.
bool Pruning::tightens() const {
  const int heads = scoring_.attention().heads();
  return inputs_.rule.statistic == LPX_JOINT && heads > 1 &&
         inputs_.model.head_dim * (heads + 1) >= 2 * kWorthTightening * scoring_.attention().rows();
}

Pruning::Outcome Pruning::prune(Pool& pool, const std::vector<Part>& parts, lpx_report& report, Progress& progress) {
  const auto segments = static_cast<size_t>(layout_.segments().count());
  const Observer observer{
      [&](int64_t segment, int32_t begin) { return norms_ + layout_.offset(segment) + begin; },
      [&](int64_t segment, int32_t begin, int32_t end, const uint32_t* kept, Scratch& scratch) { bound(segment, begin, end, kept, scratch); }};
  scoring_.find_attention(pool, progress, &observer);
  const int width = rule_.pooling == LPX_POOL_MAX ? rule_.pooling_width : 1;
  for (int64_t segment = 0; segment < layout_.segments().count(); ++segment) pass_over_protected(segment, width / 2);
  const auto largest = [&](double share) {  // for each segment, the bound above 0 that this share of what its part ranks reaches
    Cuts least(segments);
    for (const Part& part : parts) {
      const int64_t ranked = part.quota - (share == kEnough ? 0 : part.protected_entries);
      const auto count = static_cast<int64_t>(std::ceil(share * static_cast<double>(ranked)));
      const uint32_t bound = std::max(ranking_.kth_largest(pool, part, bounds_, std::min(count, part.entries)), 1u);
      for (const int64_t segment : part.segments) least[static_cast<size_t>(segment)] = bound;
    }
    return least;
  };
  const bool tight = tightens();
  if (tight) report.candidates += tighten_from(pool, largest(kTightened), progress);
  Cuts proven(segments);
  const auto rank = [&] {  // whether anything is proven of each part
    ranking_.rank(pool, parts, scores_, Ranking::Absent::kMinusInfinity, progress);
    bool all = true;
    for (size_t p = 0; p < parts.size(); ++p) {
      for (const int64_t segment : parts[p].segments) {
        const float bound = ranking_.lower_bound(p, segment);
        proven[static_cast<size_t>(segment)] = bound > 0 ? std::bit_cast<uint32_t>(bound) : 0;
        all = all && bound != -kInfinity;
      }
    }
    return all;
  };
  // With max-pooling one peak keeps its neighbours too: mostly, fewer scores than the budget prove a threshold.
  for (double share = width >= 5 ? (tight ? 0.5 : 0.65) : width >= 3 ? 0.75 : kEnough;; share = kEnough) {
    estimate_from(pool, largest(share), progress);
    if (rank() || share == kEnough) break;
  }
  int64_t left = 0;
  for (size_t segment = 0; segment < segments; ++segment) {
    const uint32_t* bounds = bounds_ + layout_.offset(static_cast<int64_t>(segment));
    int32_t reached = 0;
    for (int32_t t = 0; t < layout_.length(static_cast<int64_t>(segment)); ++t) reached += static_cast<int32_t>(bounds[t] >= proven[segment]);
    left += reached;
  }
  if (static_cast<double>(left) > kWorthwhileCandidates * static_cast<double>(layout_.entries())) {
    std::snprintf(report.fallback, sizeof report.fallback, "%.0f %% of the entries are candidates",
                  100.0 * static_cast<double>(left) / static_cast<double>(layout_.entries()));
    return Outcome::kUnproven;
  }
  if (tight)
    report.candidates += tighten_from(pool, proven, progress);
  else
    report.candidates = left;
  if (estimate_from(pool, proven, progress) > 0) rank();
  const bool settled = settle(pool, parts, proven, progress);
  report.exact_scores = exact_scores_;
  return settled ? Outcome::kRanked : Outcome::kScored;
}

void Pruning::run(Pool& pool, const std::vector<Part>& parts, const lpx_selection& out, lpx_report& report, const lpx_call& call) {
  const auto start = std::chrono::steady_clock::now();
  Progress progress(call, scoring_.work());
  const char* why_not = obstacle(parts);
  auto outcome = Outcome::kUnproven;
  if (why_not != nullptr) {
    std::snprintf(report.fallback, sizeof report.fallback, "%s", why_not);
    scoring_.find_attention(pool, progress, nullptr);
  } else if (layout_.entries() > 0) {
    outcome = prune(pool, parts, report, progress);
  }
  const bool pruned = outcome != Outcome::kUnproven;
  if (!pruned) {
    scoring_.score_all(pool, layout_, scores_, progress);
    report.candidates = layout_.entries();
    report.exact_scores = layout_.entries();
  }
  report.path = pruned ? LPX_PATH_PRUNED : LPX_PATH_FULL;
  report.score_seconds = seconds_since(start);
  const auto ranking_start = std::chrono::steady_clock::now();
  if (outcome != Outcome::kRanked) ranking_.rank(pool, parts, scores_, pruned ? Ranking::Absent::kMinusInfinity : Ranking::Absent::kNone, progress);
  report.non_finite = ranking_.non_finite();
  ranking_.emit(pool, parts, out);
  report.select_seconds = seconds_since(ranking_start);
}

}  // namespace laprox::cpu
