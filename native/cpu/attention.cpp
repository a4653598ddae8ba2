#include "cpu/attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

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

Attention::Attention(Workspace& workspace, const ScoreInputs& inputs, int lanes, int threads)
    : inputs_(inputs), queries_(workspace, inputs.model, inputs.cache, *inputs.window, inputs.cache.segments().count(), lanes) {
  const int64_t segments = inputs.cache.segments().count();
  int64_t most_squares = 0;
  int64_t most_partials = 0;
  int64_t wave_squares = 0;
  int64_t wave_partials = 0;
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t floats = int64_t{inputs.cache.length(segment)} * layout().squares();
    if (waves_.empty() || wave_squares + floats > threads * kWaveFloats) {
      waves_.push_back({segment, segment});
      wave_squares = 0;
      wave_partials = 0;
    }
    square_offsets_.push_back(wave_squares);
    partial_offsets_.push_back(wave_partials);
    wave_squares += floats;
    wave_partials += blocks(segment) * layout().count();
    waves_.back().last = segment + 1;
    most_squares = std::max(most_squares, wave_squares);
    most_partials = std::max(most_partials, wave_partials);
  }
  references_ = workspace.take<float>(segments * all_rows());
  log_sums_ = workspace.take<float>(segments * all_rows());
  residuals_ = workspace.take<float>(segments * all_rows());
  squares_ = workspace.take<float>(most_squares);
  partials_ = workspace.take<double>(most_partials);
}

void Attention::inflation(int64_t segment, float* out) const {
  const float* lse = log_sums(segment);
  const float* b = references(segment);
  for (int h = 0; h < heads(); ++h) {
    for (int g = 0; g < layout().groups(); ++g) {
      double largest = 0;
      for (int q = g * layout().group(); q < std::min((g + 1) * layout().group(), rows()); ++q) {
        const double sum = lse[h * rows() + q];
        if (sum == static_cast<double>(kInfinity)) continue;  // no attention at all
        // The exponents of both scores and bounds are rounded in float: a margin of some ulps of what they are made of.
        const double margin = 1e-6 * (4 + std::fabs(sum) + std::fabs(static_cast<double>(b[h * rows() + q])));
        largest = std::max(largest, std::exp2(-2 * (sum - b[h * rows() + q]) + margin));
        if (std::isnan(sum)) largest = sum;
      }
      out[h * layout().groups() + g] = static_cast<float>(largest);
    }
  }
}

void Attention::set_log_sum(int64_t segment, int row, double log_sum) {
  const auto rounded = static_cast<float>(log_sum);
  log_sums(segment)[row] = rounded;
  residuals(segment)[row] = std::isfinite(rounded) ? static_cast<float>(log_sum - static_cast<double>(rounded)) : 0.0f;
}

void Attention::prepare(const Kernels& kernels, int64_t segment, Scratch& scratch) {
  const Segment s = inputs_.cache.segments().at(segment);
  const int missing = rows() - existing_rows(s);
  queries_.pack(kernels, segment);
  const int32_t n = inputs_.cache.length(segment);
  if (given(segment)) {
    for (int r = 0; r < all_rows(); ++r) {
      set_log_sum(segment, r, r % rows() < missing ? kInfinity : inputs_.window->log2_sum(s, r / rows(), r % rows()));
      references(segment)[r] = log_sums(segment)[r];
    }
    return;
  }
  if (n == 0) {
    std::fill_n(references(segment), all_rows(), kInfinity);
    std::fill_n(log_sums(segment), all_rows(), kInfinity);
    std::fill_n(residuals(segment), all_rows(), 0.0f);
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

// b = the log-sum-exp over the tokens, which ascend. Rows that exist but see none of them get that over all tokens.
void Attention::reference_from(const Kernels& kernels, int64_t segment, const std::vector<int32_t>& tokens, Scratch& scratch) {
  const Segment s = inputs_.cache.segments().at(segment);
  const auto n = static_cast<size_t>(inputs_.cache.length(segment));
  const int missing = rows() - existing_rows(s);
  float* b = references(segment);
  queries_.log_sums(kernels, segment, tokens.data(), static_cast<int64_t>(tokens.size()), b, scratch);
  bool blind = false;
  for (int r = 0; r < all_rows(); ++r) {
    if (b[r] != -kInfinity) continue;
    blind = blind || r % rows() >= missing;
    b[r] = kInfinity;
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
  const int64_t stride = layout().squares();
  float* squares = squares_ + square_offsets_[static_cast<size_t>(segment)];
  std::fill_n(scratch.reference, layout().count(), kInfinity);
  for (int r = 0; r < all_rows(); ++r) scratch.reference[queries_.packed(r)] = references(segment)[r];
  double* sums = partials_ + partial_offsets_[static_cast<size_t>(segment)] + block * layout().count();
  std::fill_n(sums, layout().count(), 0.0);
  const auto begin = static_cast<int32_t>(block * kBlock);
  int32_t tokens[kScanTile];
  for (int32_t first = begin; first < std::min(n, begin + kBlock); first += kScanTile) {
    const int count = std::min<int32_t>(kScanTile, n - first);
    for (int i = 0; i < count; ++i) tokens[i] = first + i;
    if (observer != nullptr) observer->tile(segment, first, count);
    Visibility storage;
    ScanTile tile = queries_.tile(kernels, segment, tokens, count, scratch, storage);
    const void* ahead[2 * kScanTile];
    const int next = std::min(kScanTile, n - first - count);
    keys.run(first + count, next, ahead);
    if (reads_values) values.run(first + count, next, ahead + next);
    tile.ahead = ahead;
    tile.ahead_count = reads_values ? 2 * next : next;
    tile.ahead_bytes = static_cast<int>(inputs_.cache.row_bytes());
    tile.reference = scratch.reference;
    std::fill_n(scratch.row_sums, layout().count(), 0.0f);
    kernels.scan(tile, scratch.row_sums, squares + first * stride, stride);
    for (int i = 0; i < layout().count(); ++i) sums[i] += scratch.row_sums[i];
  }
}

void Attention::finish(const Kernels& kernels, int64_t segment, Scratch& scratch) {
  if (given(segment)) return;
  const Segment s = inputs_.cache.segments().at(segment);
  const Layer& layer = inputs_.model.layers[static_cast<size_t>(s.layer)];
  const int count = all_rows();
  std::vector<double> sums(static_cast<size_t>(count));
  const auto add_up = [&] {
    std::fill(sums.begin(), sums.end(), 0.0);
    const double* partials = partials_ + partial_offsets_[static_cast<size_t>(segment)];
    for (int64_t block = 0; block < blocks(segment); ++block)
      for (int r = 0; r < count; ++r) sums[static_cast<size_t>(r)] += partials[block * layout().count() + queries_.packed(r)];
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
    const int query_head = s.head * heads() + r / rows();
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
