#include <algorithm>

#include "core/status.hpp"
#include "cuda/kernels/scan_finish.cuh"
#include "cuda/launch/attention.hpp"

namespace laprox::cuda {
namespace {

// How long splits are: they run in waves of as many as a large chip (of 132 processors, whatever chip runs it: results do not depend on it) has
// room for, and each costs some tiles' time more than its tiles: loading queries, filling the pipeline, adding up.
struct Splitting {
  int64_t slots;    // of a wave
  int64_t extra;    // tiles
  int64_t longest;  // tokens: lengths that differ need splits to balance
};
constexpr Splitting kHopperSplitting = {132, 8, 32768};
constexpr Splitting kPortableSplitting = {132 * 3, 3, 8192};

// Splits of a segment of `length` tokens, of `items` (segment, panel) pairs.
int64_t best_splits(const Splitting& splitting, int64_t length, int64_t items) {
  const int64_t tiles = ceil_div(length, kScanTile);
  int64_t best = 0;
  int64_t least = 0;
  for (int64_t splits = ceil_div(length, splitting.longest); splits <= std::min<int64_t>(tiles, 1024); ++splits) {
    const int64_t cost = ceil_div(items * splits, splitting.slots) * (ceil_div(tiles, splits) + splitting.extra);
    if (best != 0 && cost >= least) continue;
    best = splits;
    least = cost;
  }
  return best == 0 ? 1024 : best;
}

bool fast_head_dim(int d) { return d == 64 || d == 96 || d == 128 || d == 256; }

Path path_for(const Geometry& shape, lpx_dtype cache, lpx_dtype window, Path wanted) {
  if (wanted == Path::kPlain || cache == LPX_F32 || cache != window || !fast_head_dim(shape.head_dim)) return Path::kPlain;
  if (wanted == Path::kPortable || (shape.head_dim != 64 && shape.head_dim != 128)) return Path::kPortable;
  return Path::kHopper;
}

}  // namespace

Attention::Attention(Arena& arena, const Geometry& shape, lpx_dtype cache, lpx_dtype window, bool squares, Path path)
    : cache_(cache), window_(window), path_(path_for(shape, cache, window, path)) {
  const int bands = static_cast<int>(ceil_div(shape.rows, kBand));
  // Heads of a panel: as few panels as there can be, evenly filled.
  int heads = std::min(bands == 1 ? 4 : bands == 2 ? 2 : 1, shape.group);
  if (path_ == Path::kPlain) heads = 1;
  view_.panels = static_cast<int>(ceil_div(shape.group, heads));
  heads = static_cast<int>(ceil_div(shape.group, view_.panels));
  view_.panel_bands = heads * bands;
  view_.head_rows = bands * kBand;
  view_.padded_rows = view_.panels * view_.panel_bands * kBand;

  const int64_t length = std::max(1, shape.max_length);
  const Splitting& splitting = path_ == Path::kHopper ? kHopperSplitting : kPortableSplitting;
  const int64_t splits = best_splits(splitting, length, int64_t{shape.segments} * view_.panels);
  view_.split_tokens = static_cast<int>(ceil_div(ceil_div(length, splits), kScanTile) * kScanTile);
  view_.splits = static_cast<int>(ceil_div(length, view_.split_tokens));

  const int64_t rows = int64_t{shape.segments} * view_.padded_rows;
  view_.references = arena.take<float>(rows);
  view_.partials = arena.take<float>(rows * view_.splits);
  view_.squares = squares ? arena.take<float>(int64_t{shape.segments} * shape.group * shape.stride) : nullptr;
  view_.ranges = arena.take<Range>(shape.segments);
  view_.outgrown = arena.take<int32_t>(shape.segments + 1);
  log_sums_ = arena.take<float>(int64_t{shape.segments} * shape.group * shape.rows);
  inflation_ = arena.take<float>(int64_t{shape.segments} * shape.group);
}

ScanView Attention::view(const Geometry& g) const {
  ScanView v = view_;
  v.g = g;
  return v;
}

void Attention::sample(const Launch& launch, const Geometry& g) const {
  if (path_ == Path::kPlain) return sample_plain(launch, view(g), cache_, window_);
  sample_mma(launch, view(g), cache_);
}

void Attention::scan(const Launch& launch, const Geometry& g) const {
  ScanView v = view(g);
  if (path_ == Path::kPlain) return scan_plain(launch, v, cache_, window_);
  if (path_ == Path::kHopper && launch.hopper) return scan_wgmma(launch, v, cache_);
  scan_mma(launch, v, cache_);
}

void Attention::finish(const Launch& launch, const Geometry& g) const {
  ScanView v = view(g);
  const auto blocks = static_cast<unsigned>(g.segments * g.group);
  finish_scan<<<blocks, 32 * kFinishGroups, 0, launch.stream>>>(v, log_sums_, inflation_, false);
  launch.check("log-sum-exps");
  if (path_ == Path::kPlain)
    repair_plain(launch, v, cache_, window_);
  else
    repair_mma(launch, v, cache_);
  finish_scan<<<blocks, 32 * kFinishGroups, 0, launch.stream>>>(v, log_sums_, inflation_, true);
  launch.check("repaired log-sum-exps");
}

void Attention::run(const Launch& launch, const Geometry& g) const {
  if (g.segments == 0) return;
  sample(launch, g);
  scan(launch, g);
  finish(launch, g);
}

}  // namespace laprox::cuda
