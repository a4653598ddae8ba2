#include "cpu/queries.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/factors.hpp"

namespace laprox::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kZeros[kMaxHeadDim] = {};  // a query row that does not exist, of any type

}  // namespace

// The fewest vectors, and of these the fewest chunks.
RowLayout::RowLayout(int heads, int rows, const Kernels& kernels) : lanes_(kernels.lanes) {
  for (int parts = 1; parts <= std::min(rows, lanes_); ++parts) {
    const int vectors = (rows + parts - 1) / parts;
    const int chunks = (heads * parts + lanes_ - 1) / lanes_;
    if (parts_ != 0 && chunks * vectors >= chunks_ * vectors_) continue;
    parts_ = parts;
    chunks_ = chunks;
    vectors_ = vectors;
  }
}

Scratch::Scratch(Workspace& workspace, const ModelShape& model, int window_rows, const Kernels& kernels) {
  const int64_t group = model.group;
  const RowLayout layout(model.group, window_rows, kernels);
  const auto tile_rows = [&](int64_t count) { return workspace.take<float>(panels_for(static_cast<int>(count)) * int64_t{kPanel} * kTile); };
  logits = tile_rows(padded_rows(model.group * window_rows));
  values = tile_rows(model.head_dim);
  columns = tile_rows(group * kFactorColumns);
  attention_pairs = tile_rows(pair_count(model.group));
  value_pairs = tile_rows(pair_count(model.group));
  heads = tile_rows(group);
  sums = workspace.take<float>(int64_t{kTile} * layout.squares());
  squares = tile_rows(layout.squares());
  reference = workspace.take<float>(layout.count());
  largest = workspace.take<float>(layout.count());
  row_sums = workspace.take<float>(layout.count());
  room = workspace.take<uint16_t>(room_size(model.head_dim));
  plain = workspace.take<float>(int64_t{kTile} * model.head_dim);
  panels = workspace.take<float>(panels_for(kFactorColumns) * int64_t{kPanel} * model.head_dim);
}

std::vector<Scratch> scratch_of_threads(Workspace& workspace, const ModelShape& model, int window_rows, const Kernels& kernels, int threads) {
  std::vector<Scratch> scratch;
  for (int i = 0; i < threads; ++i) scratch.emplace_back(workspace, model, window_rows, kernels);
  return scratch;
}

Queries::Queries(Workspace& workspace, const ModelShape& model, const Cache& cache, const Window& window, int64_t segments, const Kernels& kernels)
    : model_(model),
      cache_(cache),
      window_(window),
      segments_(segments),
      rows_(window.rows()),
      heads_(model.group),
      layout_(heads_, rows_, kernels),
      unpacked_(static_cast<size_t>((layout_.count() + kTile - 1) / kTile * kTile), -1),
      window_rows_(static_cast<size_t>(layout_.count()), 0),
      split_size_(kernels.split_parts * padded_depth(model.head_dim)),
      ordered_bytes_((kernels.pack_size(heads_ * rows_, model.head_dim) + 63) / 64 * 64) {
  for (int r = 0; r < heads_ * rows_; ++r) {
    packed_.push_back(layout_.index(r / rows_, r % rows_));
    unpacked_[static_cast<size_t>(packed_.back())] = r;
    window_rows_[static_cast<size_t>(packed_.back())] = r % rows_;
  }
  const int64_t packed_rows = segments * static_cast<int64_t>(unpacked_.size());
  ordered_ = workspace.take<std::byte>(segments * ordered_bytes_);
  scanned_ = workspace.take<float>(packed_rows * model.head_dim);
  if (split_size_ != 0) split_ = workspace.take<uint16_t>(packed_rows * split_size_);
  in_float_ = workspace.take<bool>(segments);
}

int Queries::existing_rows(Segment s) const { return std::clamp(end(s), 0, rows_); }

void Queries::pack(const Kernels& kernels, int64_t segment) {
  const Segment s = cache_.segments().at(segment);
  const int d = model_.head_dim;
  const int missing = rows_ - existing_rows(s);
  const auto query = [&](int r) -> const void* {
    if (r < 0 || r % rows_ < missing) return kZeros;
    return window_.query(s, r / rows_, r % rows_);
  };
  std::vector<const void*> rows(unpacked_.size());
  std::transform(unpacked_.begin(), unpacked_.end(), rows.begin(), query);
  for (size_t first = 0; first < rows.size(); first += kTile)
    kernels.load(window_.dtype(), rows.data() + first, kTile, d, scanned(segment) + static_cast<ptrdiff_t>(first) * d);
  in_float(segment) = split_ != nullptr && !kernels.split(window_.dtype(), scanned(segment), layout_.chunks() * layout_.vectors(), d, split(segment));
  const int count = heads_ * rows_;
  for (int r = 0; r < count; ++r) rows[static_cast<size_t>(r)] = query(r);
  kernels.pack(window_.dtype(), rows.data(), count, d, ordered(segment));
}

// Null where every row sees the tokens, which ascend.
const Visibility* Queries::mask(int64_t segment, const int32_t* tokens, int count, Scratch& scratch, Visibility& storage) const {
  const Segment s = cache_.segments().at(segment);
  const int32_t first_row = first_position(s);
  const int32_t window = model_.layers[static_cast<size_t>(s.layer)].sliding_window;
  if (window == 0 && cache_.position(s, tokens[count - 1]) <= first_row) return nullptr;
  for (int i = 0; i < count; ++i) scratch.positions[i] = cache_.position(s, tokens[i]);
  std::fill(scratch.positions + count, scratch.positions + std::max(count, kTile), std::numeric_limits<int32_t>::max());
  storage = {scratch.positions, first_row, window};
  return &storage;
}

int Queries::seen_by_all(int64_t segment, int32_t begin, int32_t end) const {
  const Segment s = cache_.segments().at(segment);
  if (model_.layers[static_cast<size_t>(s.layer)].sliding_window != 0) return 0;
  int32_t seen = begin;  // tokens before it are
  while (seen < end) {
    const int32_t middle = seen + (end - seen) / 2;
    if (cache_.position(s, middle) <= first_position(s))
      seen = middle + 1;
    else
      end = middle;
  }
  return seen - begin;
}

ScanRun Queries::run(int64_t segment, const int32_t* tokens, const void* const* keys, int count, Scratch& scratch, Visibility& storage) const {
  const Layer& layer = model_.layers[static_cast<size_t>(cache_.segments().at(segment).layer)];
  ScanRun run{};
  run.keys = keys;
  run.key_type = cache_.dtype();
  run.count = count;
  run.depth = model_.head_dim;
  run.queries = scanned(segment);
  run.vectors = layout_.chunks() * layout_.vectors();
  run.split_queries = split(segment);
  run.query_type = window_.dtype();
  run.in_float = in_float(segment);
  run.room = scratch.room;
  run.rows = window_rows_.data();
  run.scale = layer.scale;
  run.soft_cap = layer.soft_cap;
  run.masked = mask(segment, tokens, count, scratch, storage);
  return run;
}

void Queries::log_sums(const Kernels& kernels, int64_t segment, const int32_t* tokens, int64_t count, float* out, Scratch& scratch) const {
  const int missing = rows_ - existing_rows(cache_.segments().at(segment));
  std::fill_n(scratch.largest, layout_.count(), -kInfinity);
  std::fill_n(scratch.row_sums, layout_.count(), 0.0f);
  const Rows keys = cache_.keys(cache_.segments().at(segment));
  for (int64_t first = 0; first < count; first += kScanTile) {
    Visibility storage;
    const int some = static_cast<int>(std::min<int64_t>(kScanTile, count - first));
    for (int i = 0; i < some; ++i) scratch.rows[i] = keys(tokens[first + i]);
    kernels.sample(run(segment, tokens + first, scratch.rows, some, scratch, storage), scratch.largest, scratch.row_sums);
  }
  for (int r = 0; r < heads_ * rows_; ++r) {
    const int at = packed(r);
    out[r] = r % rows_ < missing ? -kInfinity : scratch.largest[at] + std::log2(scratch.row_sums[at]);
  }
}

void Queries::attend(const Kernels& kernels, int64_t segment, const int32_t* tokens, int count, const float* reference, const float* residual,
                     Scratch& scratch) const {
  const Segment s = cache_.segments().at(segment);
  const Layer& layer = model_.layers[static_cast<size_t>(s.layer)];
  const Rows keys = cache_.keys(s);
  for (int i = 0; i < count; ++i) scratch.rows[i] = keys(tokens[i]);
  LogitTile tile{};
  tile.keys = scratch.rows;
  tile.key_type = cache_.dtype();
  tile.count = count;
  tile.depth = model_.head_dim;
  tile.queries = ordered(segment);
  tile.query_type = window_.dtype();
  tile.rows = heads_ * rows_;
  tile.in_float = in_float(segment);
  tile.room = scratch.room;
  tile.out = scratch.logits;
  kernels.logits(tile);
  Visibility storage;
  const Visibility* masked = mask(segment, tokens, count, scratch, storage);
  kernels.attend({scratch.logits, count, heads_, rows_, layer.scale, layer.soft_cap, reference, residual, masked});
}

}  // namespace laprox::cpu
