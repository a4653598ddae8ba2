#include "cpu/attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/factors.hpp"

namespace laprox::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kWaveFloats = INT64_C(1) << 18;  // of squares for each thread, 1 MiB, what a cache of its own holds; one segment may take more
constexpr int kSinkSample = 4;                     // the reference point: the first keys, the last, and a stride between
constexpr int kRecentSample = 128;
constexpr int kStrideSample = 124;
constexpr double kLog2E = 1.44269504088896340736;
constexpr double kOutgrown = 1e18;  // sums of e beyond which sums of e^2 come near the end of float

}  // namespace

void prefetch(const Rows& rows, int64_t first, int64_t end, int64_t row_bytes) {
  constexpr int64_t kCacheLine = 64;
  const int count = static_cast<int>(std::min<int64_t>(kTile, end - first));
  if (count <= 0) return;
  const void* next[kTile];
  rows.run(first, count, next);
  for (int i = 0; i < count; ++i)
    for (int64_t byte = 0; byte < row_bytes; byte += kCacheLine) __builtin_prefetch(static_cast<const std::byte*>(next[i]) + byte);
}

// The most rows a group, of what wastes the fewest lanes.
RowLayout::RowLayout(int heads, int rows, int lanes) : lanes_(lanes) {
  for (int group = kBoundGroup; group > 0; --group) {
    const int groups = (rows + group - 1) / group;
    const int chunks = (heads * groups + lanes - 1) / lanes;
    if (group_ != 0 && chunks * group >= chunks_ * group_) continue;
    group_ = group;
    groups_ = groups;
    chunks_ = chunks;
  }
}

Scratch::Scratch(Workspace& workspace, const ModelShape& model, int window_rows, int lanes) {
  const int64_t group = model.group;
  const RowLayout layout(model.group, window_rows, lanes);
  const auto tile_rows = [&](int64_t count) { return workspace.take<float>(panels_for(static_cast<int>(count)) * int64_t{kPanel} * kTile); };
  keys = tile_rows(model.head_dim);
  logits = tile_rows(group * window_rows);
  values = tile_rows(model.head_dim);
  columns = tile_rows(group * kFactorColumns);
  attention_pairs = tile_rows(pair_count(model.group));
  value_pairs = tile_rows(pair_count(model.group));
  heads = tile_rows(group);
  squares = tile_rows(layout.squares());
  reference = workspace.take<float>(layout.count());
  largest = workspace.take<float>(layout.count());
  row_sums = workspace.take<float>(layout.count());
  plain = workspace.take<float>(int64_t{kScanTile} * model.head_dim);
  panels = workspace.take<float>(panels_for(kFactorColumns) * int64_t{kPanel} * model.head_dim);
}

Attention::Attention(Workspace& workspace, const ScoreInputs& inputs, int lanes, int threads)
    : inputs_(inputs),
      rows_(inputs.window->rows()),
      heads_(inputs.model.group),
      layout_(heads_, rows_, lanes),
      window_rows_(static_cast<size_t>(layout_.count()), 0) {
  for (int r = 0; r < heads_ * rows_; ++r) {
    packed_.push_back(layout_.index(r / rows_, r % rows_));
    window_rows_[static_cast<size_t>(packed_.back())] = r % rows_;
  }
  const int64_t segments = inputs.cache.segments().count();
  query_floats_ = panels_for(heads_ * rows_) * int64_t{kPanel} * inputs.model.head_dim;
  int64_t most_squares = 0;
  int64_t most_partials = 0;
  int64_t wave_squares = 0;
  int64_t wave_partials = 0;
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t floats = int64_t{inputs.cache.length(segment)} * layout_.squares();
    if (waves_.empty() || wave_squares + floats > threads * kWaveFloats) {
      waves_.push_back({segment, segment});
      wave_squares = 0;
      wave_partials = 0;
    }
    square_offsets_.push_back(wave_squares);
    partial_offsets_.push_back(wave_partials);
    wave_squares += floats;
    wave_partials += blocks(segment) * layout_.count();
    waves_.back().last = segment + 1;
    most_squares = std::max(most_squares, wave_squares);
    most_partials = std::max(most_partials, wave_partials);
  }
  queries_ = workspace.take<float>(segments * query_floats_);
  scan_queries_ = workspace.take<float>(segments * layout_.count() * inputs.model.head_dim);
  references_ = workspace.take<float>(segments * heads_ * rows_);
  log_sums_ = workspace.take<float>(segments * heads_ * rows_);
  residuals_ = workspace.take<float>(segments * heads_ * rows_);
  squares_ = workspace.take<float>(most_squares);
  partials_ = workspace.take<double>(most_partials);
}

int Attention::existing_rows(Segment s) const { return std::clamp(inputs_.cache.context(s), 0, rows_); }

void Attention::inflation(int64_t segment, float* out) const {
  const float* lse = log_sums(segment);
  const float* b = references(segment);
  for (int h = 0; h < heads_; ++h) {
    for (int g = 0; g < layout_.groups(); ++g) {
      double largest = 0;
      for (int q = g * layout_.group(); q < std::min((g + 1) * layout_.group(), rows_); ++q) {
        const double sum = lse[h * rows_ + q];
        if (sum == static_cast<double>(kInfinity)) continue;  // no attention at all
        // The exponents of both scores and bounds are rounded in float: a margin of some ulps of what they are made of.
        const double margin = 1e-6 * (4 + std::fabs(sum) + std::fabs(static_cast<double>(b[h * rows_ + q])));
        largest = std::max(largest, std::exp2(-2 * (sum - b[h * rows_ + q]) + margin));
        if (std::isnan(sum)) largest = sum;
      }
      out[h * layout_.groups() + g] = static_cast<float>(largest);
    }
  }
}

void Attention::set_log_sum(int64_t segment, int row, double log_sum) {
  const auto rounded = static_cast<float>(log_sum);
  log_sums(segment)[row] = rounded;
  residuals(segment)[row] = std::isfinite(rounded) ? static_cast<float>(log_sum - static_cast<double>(rounded)) : 0.0f;
}

// Null where every row sees the tokens, which ascend.
const Visibility* Attention::mask(int64_t segment, const int32_t* tokens, int count, Scratch& scratch, Visibility& storage) const {
  const Segment s = inputs_.cache.segments().at(segment);
  const int32_t first_row = inputs_.cache.context(s) - rows_;
  const int32_t window = inputs_.model.layers[static_cast<size_t>(s.layer)].sliding_window;
  if (window == 0 && inputs_.cache.position(s, tokens[count - 1]) <= first_row) return nullptr;
  for (int i = 0; i < count; ++i) scratch.positions[i] = inputs_.cache.position(s, tokens[i]);
  std::fill(scratch.positions + count, scratch.positions + kScanTile, std::numeric_limits<int32_t>::max());
  storage = {scratch.positions, first_row, window};
  return &storage;
}

void Attention::attend(const Kernels& kernels, int64_t segment, const int32_t* tokens, int count, Scratch& scratch) const {
  const Segment s = inputs_.cache.segments().at(segment);
  const Layer& layer = inputs_.model.layers[static_cast<size_t>(s.layer)];
  const Rows keys = inputs_.cache.keys(s);
  for (int i = 0; i < count; ++i) scratch.rows[i] = keys(tokens[i]);
  kernels.load(inputs_.cache.dtype(), scratch.rows, count, inputs_.model.head_dim, scratch.keys);
  kernels.multiply(queries(segment), heads_ * rows_, inputs_.model.head_dim, scratch.keys, count, scratch.logits);
  Visibility storage;
  const Visibility* masked = mask(segment, tokens, count, scratch, storage);
  kernels.attend({scratch.logits, count, heads_, rows_, layer.scale, layer.soft_cap, log_sums(segment), residuals(segment), masked});
}

void Attention::prepare(const Kernels& kernels, int64_t segment, Scratch& scratch) {
  const Segment s = inputs_.cache.segments().at(segment);
  const int d = inputs_.model.head_dim;
  const int missing = rows_ - existing_rows(s);
  float* panels = queries(segment);
  float* scanned = scan_queries(segment);
  const int width = layout_.count() / layout_.chunks();
  std::fill_n(panels, query_floats_, 0.0f);
  std::fill_n(scanned, int64_t{layout_.count()} * d, 0.0f);
  float row[kMaxHeadDim];
  for (int r = 0; r < heads_ * rows_; ++r) {
    if (r % rows_ < missing) continue;
    kernels.convert(inputs_.window->dtype(), inputs_.window->query(s, r / rows_, r % rows_), d, row);
    float* to = panels + static_cast<ptrdiff_t>(r / kPanel) * d * kPanel + r % kPanel;
    const int at = packed(r);
    float* scan_to = scanned + static_cast<ptrdiff_t>(at / width) * d * width + at % width;
    for (int k = 0; k < d; ++k) to[k * kPanel] = scan_to[k * width] = row[k];
  }
  const int32_t n = inputs_.cache.length(segment);
  if (given(segment)) {
    for (int r = 0; r < heads_ * rows_; ++r) {
      set_log_sum(segment, r, r % rows_ < missing ? kInfinity : inputs_.window->log2_sum(s, r / rows_, r % rows_));
      references(segment)[r] = log_sums(segment)[r];
    }
    return;
  }
  if (n == 0) {
    std::fill_n(references(segment), heads_ * rows_, kInfinity);
    std::fill_n(log_sums(segment), heads_ * rows_, kInfinity);
    std::fill_n(residuals(segment), heads_ * rows_, 0.0f);
    return;
  }
  std::vector<int32_t> sample;
  const int32_t middle = std::max(0, n - kSinkSample - kRecentSample);
  for (int32_t t = 0; t < std::min(n, kSinkSample); ++t) sample.push_back(t);
  for (int32_t i = 0; i < std::min(middle, kStrideSample); ++i)
    sample.push_back(kSinkSample + static_cast<int32_t>(int64_t{middle} * i / std::min(middle, kStrideSample)));
  for (int32_t t = std::max(kSinkSample, n - kRecentSample); t < n; ++t) sample.push_back(t);
  reference_from(kernels, segment, sample, scratch);
}

// The reference is left to the caller.
ScanTile Attention::scan_tile(const Kernels& kernels, int64_t segment, const int32_t* tokens, int count, Scratch& scratch) const {
  const Segment s = inputs_.cache.segments().at(segment);
  const Layer& layer = inputs_.model.layers[static_cast<size_t>(s.layer)];
  const Rows keys = inputs_.cache.keys(s);
  const int d = inputs_.model.head_dim;
  if (tokens[count - 1] - tokens[0] == count - 1) {
    keys.run(tokens[0], count, scratch.rows);
  } else {
    for (int i = 0; i < count; ++i) scratch.rows[i] = keys(tokens[i]);
  }
  for (int i = 0; i < kScanTile; ++i) {
    if (i >= count) {
      scratch.floats[i] = scratch.floats[count - 1];  // fills the last block
    } else if (inputs_.cache.dtype() == LPX_F32) {
      scratch.floats[i] = static_cast<const float*>(scratch.rows[i]);
    } else {
      kernels.convert(inputs_.cache.dtype(), scratch.rows[i], d, scratch.plain + int64_t{i} * d);
      scratch.floats[i] = scratch.plain + int64_t{i} * d;
    }
  }
  ScanTile tile{};
  tile.keys = scratch.floats;
  tile.count = count;
  tile.depth = d;
  tile.queries = scan_queries(segment);
  tile.chunks = layout_.chunks();
  tile.group = layout_.group();
  tile.rows = window_rows_.data();
  tile.scale = layer.scale;
  tile.soft_cap = layer.soft_cap;
  return tile;
}

// b = the log-sum-exp over the tokens, which ascend. Rows that exist but see none of them get that over all tokens.
void Attention::reference_from(const Kernels& kernels, int64_t segment, const std::vector<int32_t>& tokens, Scratch& scratch) {
  const Segment s = inputs_.cache.segments().at(segment);
  const auto n = static_cast<size_t>(inputs_.cache.length(segment));
  const int missing = rows_ - existing_rows(s);
  std::fill_n(scratch.largest, layout_.count(), -kInfinity);
  std::fill_n(scratch.row_sums, layout_.count(), 0.0f);
  for (size_t first = 0; first < tokens.size(); first += kScanTile) {
    const int count = static_cast<int>(std::min<size_t>(kScanTile, tokens.size() - first));
    ScanTile tile = scan_tile(kernels, segment, tokens.data() + first, count, scratch);
    Visibility storage;
    tile.masked = mask(segment, tokens.data() + first, count, scratch, storage);
    kernels.sample(tile, scratch.largest, scratch.row_sums);
  }
  bool blind = false;
  for (int r = 0; r < heads_ * rows_; ++r) {
    float& b = references(segment)[r];
    const int at = packed(r);
    b = scratch.largest[at] + std::log2(scratch.row_sums[at]);
    blind = blind || (r % rows_ >= missing && b == -kInfinity);
    if (r % rows_ < missing || b == -kInfinity) b = kInfinity;
  }
  if (blind && tokens.size() < n) reference_from_all(kernels, segment, scratch);
}

void Attention::reference_from_all(const Kernels& kernels, int64_t segment, Scratch& scratch) {
  std::vector<int32_t> tokens(static_cast<size_t>(inputs_.cache.length(segment)));
  std::iota(tokens.begin(), tokens.end(), 0);
  reference_from(kernels, segment, tokens, scratch);
}

void Attention::scan_block(const Kernels& kernels, int64_t segment, int64_t block, Scratch& scratch, const Observer* observer) {
  const Segment s = inputs_.cache.segments().at(segment);
  const Rows keys = inputs_.cache.keys(s);
  const bool reads_values = observer != nullptr && !inputs_.cache.has_value_norms(s.layer);
  const Rows values = inputs_.cache.values(s);
  const int32_t n = inputs_.cache.length(segment);
  const int64_t stride = layout_.squares();
  float* squares = squares_ + square_offsets_[static_cast<size_t>(segment)];
  std::fill_n(scratch.reference, layout_.count(), kInfinity);
  for (int r = 0; r < heads_ * rows_; ++r) scratch.reference[packed(r)] = references(segment)[r];
  double* sums = partials_ + partial_offsets_[static_cast<size_t>(segment)] + block * layout_.count();
  std::fill_n(sums, layout_.count(), 0.0);
  const auto begin = static_cast<int32_t>(block * kBlock);
  int32_t tokens[kScanTile];
  for (int32_t first = begin; first < std::min(n, begin + kBlock); first += kScanTile) {
    const int count = std::min<int32_t>(kScanTile, n - first);
    for (int i = 0; i < count; ++i) tokens[i] = first + i;
    if (observer != nullptr) observer->tile(segment, first, count);
    ScanTile tile = scan_tile(kernels, segment, tokens, count, scratch);
    const void* ahead[2 * kScanTile];
    const int next = std::min(kScanTile, n - first - count);
    keys.run(first + count, next, ahead);
    if (reads_values) values.run(first + count, next, ahead + next);
    tile.ahead = ahead;
    tile.ahead_count = reads_values ? 2 * next : next;
    tile.ahead_bytes = static_cast<int>(inputs_.cache.row_bytes());
    Visibility storage;
    tile.masked = mask(segment, tokens, count, scratch, storage);
    tile.reference = scratch.reference;
    std::fill_n(scratch.row_sums, layout_.count(), 0.0f);
    kernels.scan(tile, scratch.row_sums, squares + first * stride, stride);
    for (int i = 0; i < layout_.count(); ++i) sums[i] += scratch.row_sums[i];
  }
}

void Attention::finish(const Kernels& kernels, int64_t segment, Scratch& scratch) {
  if (given(segment)) return;
  const Segment s = inputs_.cache.segments().at(segment);
  const Layer& layer = inputs_.model.layers[static_cast<size_t>(s.layer)];
  const int count = heads_ * rows_;
  std::vector<double> sums(static_cast<size_t>(count));
  const auto add_up = [&] {
    std::fill(sums.begin(), sums.end(), 0.0);
    const double* partials = partials_ + partial_offsets_[static_cast<size_t>(segment)];
    for (int64_t block = 0; block < blocks(segment); ++block)
      for (int r = 0; r < count; ++r) sums[static_cast<size_t>(r)] += partials[block * layout_.count() + packed(r)];
  };
  add_up();
  // A token outside the sample with a logit far above it: start again from all tokens, where no term exceeds 1.
  if (std::any_of(sums.begin(), sums.end(), [](double sum) { return !(sum < kOutgrown); })) {
    reference_from_all(kernels, segment, scratch);
    for (int64_t block = 0; block < blocks(segment); ++block) scan_block(kernels, segment, block, scratch, nullptr);
    add_up();
  }
  const float* b = references(segment);
  for (int r = 0; r < count; ++r) {
    double sum = sums[static_cast<size_t>(r)];
    const int query_head = s.head * heads_ + r / rows_;
    if (b[r] == kInfinity) {
      set_log_sum(segment, r, kInfinity);
      continue;
    }
    if (!layer.sink_logits.empty()) sum += std::exp2(kLog2E * layer.sink_logits[static_cast<size_t>(query_head)] - b[r]);
    set_log_sum(segment, r, sum == 0 ? static_cast<double>(kInfinity) : b[r] + std::log2(sum));
  }
}

void Attention::run(Pool& pool, const Kernels& kernels, std::vector<Scratch>& scratch, Progress& progress, const Observer* observer) {
  const auto local = [&](int worker) -> Scratch& { return scratch[static_cast<size_t>(worker)]; };
  for (const Wave& wave : waves_) {
    pool.run(wave.last - wave.first, [&](int64_t i, int worker) {
      if (!progress.cancelled()) prepare(kernels, wave.first + i, local(worker));
    });
    std::vector<std::pair<int64_t, int64_t>> tasks;
    for (int64_t segment = wave.first; segment < wave.last; ++segment) {
      if (given(segment) && observer == nullptr) continue;
      for (int64_t block = 0; block < blocks(segment); ++block) tasks.emplace_back(segment, block);
    }
    pool.run(static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
      const auto [segment, block] = tasks[static_cast<size_t>(i)];
      if (progress.cancelled()) return;
      scan_block(kernels, segment, block, local(worker), observer);
      progress.advance(std::min<int64_t>(kBlock, inputs_.cache.length(segment) - block * kBlock));
    });
    progress.check();
    pool.run(wave.last - wave.first, [&](int64_t i, int worker) { finish(kernels, wave.first + i, local(worker)); });
    if (observer != nullptr) observer->wave(wave);
  }
}

}  // namespace laprox::cpu
