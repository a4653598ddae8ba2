#include <algorithm>

#include "core/status.hpp"
#include "cuda/kernels/scan_finish.cuh"
#include "cuda/kernels/scan_statistic.cuh"
#include "cuda/launch/attention.hpp"

namespace laprox::cuda {
namespace {

// Blocks of a kernel that a large chip (of 132 processors, whatever chip runs it: results do not depend on it) has room for at a time.
constexpr int kHopperBlocks = 132;
constexpr int kPortableBlocks = 132 * 3;
constexpr int kPlainBlocks = 132 * 8;

bool fast_head_dim(int d) { return d == 64 || d == 96 || d == 128 || d == 256; }

Path path_for(const Geometry& shape, lpx_dtype cache, lpx_dtype window, Path wanted) {
  if (wanted == Path::kPlain || cache == LPX_F32 || cache != window || !fast_head_dim(shape.head_dim)) return Path::kPlain;
  if (wanted == Path::kPortable || (shape.head_dim != 64 && shape.head_dim != 128)) return Path::kPortable;
  return Path::kHopper;
}

}  // namespace

Attention::Attention(Arena& arena, const Geometry& shape, lpx_dtype cache, lpx_dtype window, const Known& known, bool roots, Path path)
    : cache_(cache), window_(window), path_(path_for(shape, cache, window, path)), given_(known.log_sums) {
  const int bands = static_cast<int>(ceil_div(shape.rows, kBand));
  // Heads of a panel: as few panels as there can be, evenly filled.
  int heads = std::min(bands == 1 ? 4 : bands == 2 ? 2 : 1, shape.group);
  if (path_ == Path::kPlain) heads = 1;
  view_.panels = static_cast<int>(ceil_div(shape.group, heads));
  heads = static_cast<int>(ceil_div(shape.group, view_.panels));
  view_.panel_bands = heads * bands;
  view_.head_rows = bands * kBand;
  view_.padded_rows = view_.panels * view_.panel_bands * kBand;

  const int blocks = path_ == Path::kPlain ? kPlainBlocks : path_ == Path::kPortable ? kPortableBlocks : kHopperBlocks;
  view_.workers = std::max(1, blocks / view_.panels);

  view_.references = arena.take<float>(int64_t{shape.segments} * view_.padded_rows);
  view_.partials = arena.take<float>((int64_t{shape.segments} + view_.workers) * view_.padded_rows);
  view_.roots = roots ? arena.take<__nv_bfloat16>(int64_t{shape.segments} * view_.panels * view_.panel_heads() * shape.stride) : nullptr;
  view_.ranges = arena.take<Range>(shape.segments);
  view_.first_tile = arena.take<int32_t>(shape.segments + 1);
  view_.outgrown = arena.take<int32_t>(shape.segments + 1);
  log_sums_ = arena.take<float>(int64_t{shape.segments} * shape.group * shape.rows);
  inflation_ = arena.take<float>(int64_t{shape.segments} * shape.group);
  exact_inflation_ = arena.take<float>(int64_t{shape.segments} * shape.group);
}

ScanView Attention::view(const Geometry& g) const {
  ScanView v = view_;
  v.g = g;
  return v;
}

bool Attention::sample(const Launch& launch, const Geometry& g) const {
  if (g.segments == 0) return false;
  if (path_ == Path::kPlain)
    sample_plain(launch, view(g), cache_, window_);
  else
    sample_mma(launch, view(g), cache_);
  return true;
}

void Attention::scan(const Launch& launch, const Geometry& g, const PackedQueries& packed) const {
  const ScanView v = view(g);
  const ScanResults to = {log_sums_, inflation_, exact_inflation_, packed};
  const bool plain = path_ == Path::kPlain;
  const bool scans = !given_ || v.roots != nullptr;
  if (scans && plain)
    scan_plain(launch, v, cache_, window_);
  else if (scans && path_ == Path::kHopper)
    scan_wgmma(launch, v, cache_);
  else if (scans)
    scan_mma(launch, v, cache_);
  launch.run("log-sum-exps", finish_scan, static_cast<unsigned>(g.segments * g.group), 32 * kFinishGroups, 0, v, to, given_ && scans);
  if (given_) return;
  plain ? repair_plain(launch, v, to, cache_, window_) : repair_mma(launch, v, to, cache_);
}

bool Attention::tighten(const Launch& launch, const Geometry& g, const int32_t* tokens, const int32_t* counts, BoundTerms terms,
                        float* scores) const {
  StatisticView lists{};
  lists.log_sums = log_sums_;
  lists.tokens = tokens;
  lists.counts = counts;
  lists.bound = terms;
  lists.bound.inflation = exact_inflation_;
  lists.scores = scores;
  roots_wgmma(launch, view(g), lists, cache_);
  return view_.panels == 1;
}

bool Attention::scores(const lpx_score_rule& rule) const {
  return path_ == Path::kHopper && rule.attention != LPX_ATTENTION_MAX && rule.attention != LPX_ATTENTION_NONE;
}

void Attention::score(const Launch& launch, const Geometry& g, const lpx_score_rule& rule, bool weigh, float* scores) const {
  if (g.segments == 0) return;
  ScanView v = view(g);
  v.roots = nullptr;
  v.workers = kHopperBlocks;  // a panel has the chip for itself
  launch.run("attention statistics", number_all_tiles, 1, kNumberThreads, 0, v);
  StatisticView statistic{};
  statistic.log_sums = log_sums_;
  statistic.scores = scores;
  statistic.aggregation = rule.aggregation;
  statistic.mean = rule.attention == LPX_ATTENTION_MEAN;
  statistic.only_last = rule.attention == LPX_ATTENTION_LAST;
  statistic.weigh = weigh;
  for (; statistic.panel < v.panels; ++statistic.panel) score_wgmma(launch, v, statistic, rule.attention == LPX_ATTENTION_L2, cache_);
}

}  // namespace laprox::cuda
