#include "cpu/attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/factors.hpp"

namespace laprox::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kWaveFloats = INT64_C(4) << 20;  // of squares, 16 MiB; one segment may take more
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

Scratch::Scratch(Workspace& workspace, const ModelShape& model, int window_rows) {
  const int64_t group = model.group;
  const int64_t groups = (window_rows + kBoundGroup - 1) / kBoundGroup;
  const auto tile_rows = [&](int64_t count) { return workspace.take<float>(panels_for(static_cast<int>(count)) * int64_t{kPanel} * kTile); };
  keys = tile_rows(model.head_dim);
  logits = tile_rows(group * window_rows);
  values = tile_rows(model.head_dim);
  columns = tile_rows(group * kFactorColumns);
  attention_pairs = tile_rows(pair_count(model.group));
  value_pairs = tile_rows(pair_count(model.group));
  heads = tile_rows(group);
  squares = tile_rows(group * groups);
  row_sums = workspace.take<float>(group * window_rows * kSumLanes);
  plain = workspace.take<float>(int64_t{kTile} * model.head_dim);
  panels = workspace.take<float>(panels_for(kFactorColumns) * int64_t{kPanel} * model.head_dim);
}

Attention::Attention(Workspace& workspace, const ScoreInputs& inputs)
    : inputs_(inputs), rows_(inputs.window->rows()), heads_(inputs.model.group), groups_((rows_ + kBoundGroup - 1) / kBoundGroup) {
  const int64_t segments = inputs.cache.segments().count();
  query_floats_ = panels_for(heads_ * rows_) * int64_t{kPanel} * inputs.model.head_dim;
  int64_t most_squares = 0;
  int64_t most_partials = 0;
  int64_t wave_squares = 0;
  int64_t wave_partials = 0;
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t floats = padded(segment) * heads_ * groups_;
    if (waves_.empty() || wave_squares + floats > kWaveFloats) {
      waves_.push_back({segment, segment});
      wave_squares = 0;
      wave_partials = 0;
    }
    square_offsets_.push_back(wave_squares);
    partial_offsets_.push_back(wave_partials);
    wave_squares += floats;
    wave_partials += blocks(segment) * heads_ * rows_;
    waves_.back().last = segment + 1;
    most_squares = std::max(most_squares, wave_squares);
    most_partials = std::max(most_partials, wave_partials);
  }
  queries_ = workspace.take<float>(segments * query_floats_);
  references_ = workspace.take<float>(segments * heads_ * rows_);
  log_sums_ = workspace.take<float>(segments * heads_ * rows_);
  residuals_ = workspace.take<float>(segments * heads_ * rows_);
  squares_ = workspace.take<float>(most_squares);
  partials_ = workspace.take<double>(most_partials);
}

int Attention::existing_rows(Segment s) const { return std::clamp(inputs_.cache.context(s), 0, rows_); }

const float* Attention::squares(int64_t segment, int64_t& stride) const {
  stride = padded(segment);
  return squares_ + square_offsets_[static_cast<size_t>(segment)];
}

void Attention::inflation(int64_t segment, float* out) const {
  const float* lse = log_sums(segment);
  const float* b = references(segment);
  for (int h = 0; h < heads_; ++h) {
    for (int g = 0; g < groups_; ++g) {
      double largest = 0;
      for (int q = g * kBoundGroup; q < std::min((g + 1) * kBoundGroup, rows_); ++q) {
        const double sum = lse[h * rows_ + q];
        if (sum == static_cast<double>(kInfinity)) continue;  // no attention at all
        // The exponents of both scores and bounds are rounded in float: a margin of some ulps of what they are made of.
        const double margin = 1e-6 * (4 + std::fabs(sum) + std::fabs(static_cast<double>(b[h * rows_ + q])));
        largest = std::max(largest, std::exp2(-2 * (sum - b[h * rows_ + q]) + margin));
        if (std::isnan(sum)) largest = sum;
      }
      out[h * groups_ + g] = static_cast<float>(largest);
    }
  }
}

void Attention::set_log_sum(int64_t segment, int row, double log_sum) {
  const auto rounded = static_cast<float>(log_sum);
  log_sums(segment)[row] = rounded;
  residuals(segment)[row] = std::isfinite(rounded) ? static_cast<float>(log_sum - static_cast<double>(rounded)) : 0.0f;
}

void Attention::load_positions(int64_t segment, const int32_t* tokens, int count, int32_t* positions) const {
  const Segment s = inputs_.cache.segments().at(segment);
  for (int i = 0; i < count; ++i) positions[i] = inputs_.cache.position(s, tokens[i]);
}

const Visibility* Attention::mask(int64_t segment, int32_t last_position, int count, bool whole, Scratch& scratch, Visibility& storage) const {
  const Segment s = inputs_.cache.segments().at(segment);
  const int32_t first_row = inputs_.cache.context(s) - rows_;
  const int32_t window = inputs_.model.layers[static_cast<size_t>(s.layer)].sliding_window;
  storage = {scratch.positions, count, first_row, window};
  return window == 0 && last_position <= first_row && (whole || count == kTile) ? nullptr : &storage;
}

AttentionTile Attention::tile(const Kernels& kernels, int64_t segment, const void* const* rows, int count, Scratch& scratch) const {
  const Segment s = inputs_.cache.segments().at(segment);
  const Layer& layer = inputs_.model.layers[static_cast<size_t>(s.layer)];
  kernels.load(inputs_.cache.dtype(), rows, count, inputs_.model.head_dim, scratch.keys);
  kernels.multiply(queries(segment), heads_ * rows_, inputs_.model.head_dim, scratch.keys, scratch.logits);
  return {scratch.logits, heads_, rows_, layer.scale, layer.soft_cap, references(segment), nullptr, nullptr};
}

void Attention::attend(const Kernels& kernels, int64_t segment, const int32_t* tokens, int count, Scratch& scratch) const {
  const Rows keys = inputs_.cache.keys(inputs_.cache.segments().at(segment));
  for (int i = 0; i < count; ++i) scratch.rows[i] = keys(tokens[i]);
  AttentionTile attention = tile(kernels, segment, scratch.rows, count, scratch);
  attention.reference = log_sums(segment);
  attention.residual = residuals(segment);
  load_positions(segment, tokens, count, scratch.positions);
  Visibility storage;
  attention.masked = mask(segment, scratch.positions[count - 1], count, true, scratch, storage);
  kernels.attend(attention);
}

void Attention::prepare(const Kernels& kernels, int64_t segment, Scratch& scratch) {
  const Segment s = inputs_.cache.segments().at(segment);
  const int d = inputs_.model.head_dim;
  const int missing = rows_ - existing_rows(s);
  float* panels = queries(segment);
  std::fill_n(panels, query_floats_, 0.0f);
  float row[kMaxHeadDim];
  for (int r = 0; r < heads_ * rows_; ++r) {
    if (r % rows_ < missing) continue;
    kernels.convert(inputs_.window->dtype(), inputs_.window->query(s, r / rows_, r % rows_), d, row);
    float* to = panels + static_cast<ptrdiff_t>(r / kPanel) * d * kPanel + r % kPanel;
    for (int k = 0; k < d; ++k) to[k * kPanel] = row[k];
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

// b = the log-sum-exp over the sample. Rows that exist but see none of it get the maximum over all tokens.
void Attention::reference_from(const Kernels& kernels, int64_t segment, const std::vector<int32_t>& tokens, Scratch& scratch) {
  const Segment s = inputs_.cache.segments().at(segment);
  const Rows keys = inputs_.cache.keys(s);
  const int missing = rows_ - existing_rows(s);
  float* b = references(segment);
  std::vector<float> sums(static_cast<size_t>(heads_ * rows_), 0.0f);
  std::fill_n(b, heads_ * rows_, -kInfinity);
  for (size_t first = 0; first < tokens.size(); first += kTile) {
    const int count = static_cast<int>(std::min<size_t>(kTile, tokens.size() - first));
    for (int i = 0; i < count; ++i) scratch.rows[i] = keys(tokens[first + static_cast<size_t>(i)]);
    AttentionTile logits = tile(kernels, segment, scratch.rows, count, scratch);
    load_positions(segment, tokens.data() + first, count, scratch.positions);
    Visibility storage;
    logits.masked = mask(segment, scratch.positions[count - 1], count, false, scratch, storage);
    kernels.finish_logits(logits);
    kernels.accumulate_log_sums(scratch.logits, heads_ * rows_, b, sums.data());
  }
  bool blind = false;
  for (int r = 0; r < heads_ * rows_; ++r) {
    if (r % rows_ < missing) {
      b[r] = kInfinity;
    } else if (b[r] == -kInfinity) {
      blind = true;
    } else {
      b[r] += std::log2(sums[static_cast<size_t>(r)]);
    }
  }
  if (blind) reference_from_maximum(kernels, segment, scratch);
}

void Attention::reference_from_maximum(const Kernels& kernels, int64_t segment, Scratch& scratch) {
  const Segment s = inputs_.cache.segments().at(segment);
  const Rows keys = inputs_.cache.keys(s);
  const int32_t n = inputs_.cache.length(segment);
  float* b = references(segment);
  std::fill_n(b, heads_ * rows_, -kInfinity);
  int32_t tokens[kTile];
  for (int32_t first = 0; first < n; first += kTile) {
    const int count = std::min<int32_t>(kTile, n - first);
    for (int i = 0; i < count; ++i) tokens[i] = first + i;
    keys.run(first, count, scratch.rows);
    AttentionTile logits = tile(kernels, segment, scratch.rows, count, scratch);
    load_positions(segment, tokens, count, scratch.positions);
    Visibility storage;
    logits.masked = mask(segment, scratch.positions[count - 1], count, false, scratch, storage);
    kernels.finish_logits(logits);
    for (int r = 0; r < heads_ * rows_; ++r) {
      const float* row = scratch.logits + static_cast<ptrdiff_t>(r) * kTile;
      for (int t = 0; t < kTile; ++t) b[r] = row[t] > b[r] || row[t] != row[t] ? row[t] : b[r];
    }
  }
  const int missing = rows_ - existing_rows(s);
  for (int r = 0; r < heads_ * rows_; ++r)
    if (r % rows_ < missing || b[r] == -kInfinity) b[r] = kInfinity;
}

void Attention::scan_block(const Kernels& kernels, int64_t segment, int64_t block, Scratch& scratch) {
  const Rows keys = inputs_.cache.keys(inputs_.cache.segments().at(segment));
  const int32_t n = inputs_.cache.length(segment);
  const int64_t stride = padded(segment);
  float* squares = squares_ + square_offsets_[static_cast<size_t>(segment)];
  std::fill_n(scratch.row_sums, heads_ * rows_ * kSumLanes, 0.0f);
  const auto begin = static_cast<int32_t>(block * kBlock);
  int32_t tokens[kTile];
  for (int32_t first = begin; first < std::min(n, begin + kBlock); first += kTile) {
    const int count = std::min<int32_t>(kTile, n - first);
    keys.run(first, count, scratch.rows);
    prefetch(keys, first + kTile, n, inputs_.cache.row_bytes());
    AttentionTile attention = tile(kernels, segment, scratch.rows, count, scratch);
    for (int i = 0; i < count; ++i) tokens[i] = first + i;
    load_positions(segment, tokens, count, scratch.positions);
    Visibility storage;
    attention.masked = mask(segment, scratch.positions[count - 1], count, false, scratch, storage);
    kernels.scan(attention, scratch.row_sums, squares + first, stride);
  }
  double* sums = partials_ + partial_offsets_[static_cast<size_t>(segment)] + block * heads_ * rows_;
  for (int r = 0; r < heads_ * rows_; ++r) {
    sums[r] = 0;
    for (int lane = 0; lane < kSumLanes; ++lane) sums[r] += scratch.row_sums[r * kSumLanes + lane];
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
      for (int r = 0; r < count; ++r) sums[static_cast<size_t>(r)] += partials[block * count + r];
  };
  add_up();
  // A token outside the sample with a logit far above it: start again from the maximum, where no term exceeds 1.
  if (std::any_of(sums.begin(), sums.end(), [](double sum) { return !(sum < kOutgrown); })) {
    reference_from_maximum(kernels, segment, scratch);
    for (int64_t block = 0; block < blocks(segment); ++block) scan_block(kernels, segment, block, scratch);
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

void Attention::run(Pool& pool, const Kernels& kernels, std::vector<Scratch>& scratch, Progress& progress,
                    const std::function<void(const Wave&)>& seen) {
  const auto local = [&](int worker) -> Scratch& { return scratch[static_cast<size_t>(worker)]; };
  for (const Wave& wave : waves_) {
    pool.run(wave.last - wave.first, [&](int64_t i, int worker) {
      if (!progress.cancelled()) prepare(kernels, wave.first + i, local(worker));
    });
    std::vector<std::pair<int64_t, int64_t>> tasks;
    for (int64_t segment = wave.first; segment < wave.last; ++segment) {
      if (given(segment) && !seen) continue;
      for (int64_t block = 0; block < blocks(segment); ++block) tasks.emplace_back(segment, block);
    }
    pool.run(static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
      const auto [segment, block] = tasks[static_cast<size_t>(i)];
      if (progress.cancelled()) return;
      scan_block(kernels, segment, block, local(worker));
      progress.advance(std::min<int64_t>(kBlock, inputs_.cache.length(segment) - block * kBlock));
    });
    progress.check();
    pool.run(wave.last - wave.first, [&](int64_t i, int worker) { finish(kernels, wave.first + i, local(worker)); });
    if (seen) seen(wave);
  }
}

}  // namespace laprox::cpu
