#include "cpu/attention.hpp"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <numeric>

namespace laprox::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kWaveBytes = INT64_C(9) << 16;  // of what the scan leaves of a wave, for each thread; one segment may take more
constexpr size_t kPlaces = 2;                     // one is scanned while one is told of
constexpr size_t kSmallPlaces = 3;                // where waves are small: another for whoever is ahead
constexpr int kScannedBlock = 4080;               // tokens that an observer is told of at a time
constexpr int kSinkSample = 4;                    // the reference point: the first keys, the last of every row's own, and a stride between
constexpr int kStrideSample = 12;
constexpr double kCut = 1 + 0x1p-7;  // what cutting a float to bfloat16 may take
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

Attention::Attention(Workspace& workspace, const ScoreInputs& inputs, const Kernels& kernels, int threads, bool observed)
    : inputs_(inputs), kernels_(kernels), queries_(workspace, inputs.model, inputs.cache, *inputs.window, inputs.cache.segments().count(), kernels) {
  const int64_t segments = inputs.cache.segments().count();
  int64_t most_kept = 0;
  int64_t most_partials = 0;
  int64_t wave_kept = 0;
  int64_t wave_partials = 0;
  const auto bytes = [](int64_t kept, int64_t partials) { return kept * int64_t{sizeof *kept_} + partials * int64_t{sizeof *partials_}; };
  for (int64_t segment = 0; segment < segments; ++segment) {
    const int64_t kept = observed ? int64_t{inputs.cache.length(segment)} * layout().kept() : 0;
    const int64_t partials = blocks(segment) * layout().count();
    if (waves_.empty() || bytes(wave_kept + kept, wave_partials + partials) > threads * kWaveBytes) {
      waves_.push_back({segment, segment});
      wave_kept = 0;
      wave_partials = 0;
    }
    kept_offsets_.push_back(wave_kept);
    partial_offsets_.push_back(wave_partials);
    wave_kept += kept;
    wave_partials += partials;
    waves_.back().last = segment + 1;
    most_kept = std::max(most_kept, wave_kept);
    most_partials = std::max(most_partials, wave_partials);
  }
  places_ = std::min(waves_.size(), bytes(most_kept, most_partials) > threads * kWaveBytes ? kPlaces : kSmallPlaces);
  for (size_t wave = 0; wave < waves_.size(); ++wave) {
    const auto place = static_cast<int64_t>(wave % places_);
    for (auto segment = static_cast<size_t>(waves_[wave].first); segment < static_cast<size_t>(waves_[wave].last); ++segment) {
      kept_offsets_[segment] += place * most_kept;
      partial_offsets_[segment] += place * most_partials;
    }
  }
  const auto places = static_cast<int64_t>(places_);
  references_ = workspace.take<float>(segments * all_rows());
  log_sums_ = workspace.take<float>(segments * all_rows());
  residuals_ = workspace.take<float>(segments * all_rows());
  weights_ = workspace.take<float>(segments * layout().count());
  kept_ = workspace.take<uint32_t>(places * most_kept);
  partials_ = workspace.take<double>(places * most_partials);
}

void Attention::weigh(int64_t segment) {
  const float* lse = log_sums(segment);
  const float* b = references(segment);
  float* out = weights_ + segment * layout().count();
  std::fill_n(out, layout().count(), 0.0f);
  for (int r = 0; r < all_rows(); ++r) {
    const double sum = lse[r];
    if (sum == static_cast<double>(kInfinity)) continue;  // no attention at all
    // The exponents of both scores and bounds are rounded in float: a margin of some ulps of what they are made of.
    const double margin = 1e-6 * (4 + std::fabs(sum) + std::fabs(static_cast<double>(b[r])));
    out[queries_.packed(r)] = static_cast<float>(kCut * std::exp2(static_cast<double>(b[r]) - sum + margin));
  }
}

void Attention::set_log_sum(int64_t segment, int row, double log_sum) {
  const auto rounded = static_cast<float>(log_sum);
  log_sums(segment)[row] = rounded;
  residuals(segment)[row] = std::isfinite(rounded) ? static_cast<float>(log_sum - static_cast<double>(rounded)) : 0.0f;
}

void Attention::prepare(int64_t segment, Scratch& scratch) {
  const Segment s = inputs_.cache.segments().at(segment);
  const int missing = rows() - existing_rows(s);
  queries_.pack(kernels_, segment);
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
  const int32_t middle = std::max(0, n - kSinkSample - rows());
  for (int32_t t = 0; t < std::min(n, kSinkSample); ++t) sample.push_back(t);
  for (int32_t i = 0; i < std::min(middle, kStrideSample); ++i)
    sample.push_back(kSinkSample + static_cast<int32_t>(int64_t{middle} * i / std::min(middle, kStrideSample)));
  for (int32_t t = std::max(kSinkSample, n - rows()); t < n; ++t) sample.push_back(t);
  reference_from(segment, sample, scratch);
}

// b = the log-sum-exp over the tokens, which ascend. Rows that exist but see none of them get that over all tokens.
void Attention::reference_from(int64_t segment, const std::vector<int32_t>& tokens, Scratch& scratch) {
  const Segment s = inputs_.cache.segments().at(segment);
  const auto n = static_cast<size_t>(inputs_.cache.length(segment));
  const int missing = rows() - existing_rows(s);
  float* b = references(segment);
  queries_.log_sums(kernels_, segment, tokens.data(), static_cast<int64_t>(tokens.size()), b, scratch);
  bool blind = false;
  for (int r = 0; r < all_rows(); ++r) {
    if (b[r] != -kInfinity) continue;
    blind = blind || r % rows() >= missing;
    b[r] = kInfinity;
  }
  if (blind && tokens.size() < n) reference_from_all(segment, scratch);
}

void Attention::reference_from_all(int64_t segment, Scratch& scratch) {
  std::vector<int32_t> tokens(static_cast<size_t>(inputs_.cache.length(segment)));
  std::iota(tokens.begin(), tokens.end(), 0);
  reference_from(segment, tokens, scratch);
}

void Attention::scan_block(int64_t segment, int64_t block, Scratch& scratch, const Observer* observer) {
  const Segment s = inputs_.cache.segments().at(segment);
  const Rows keys = inputs_.cache.keys(s);
  const bool reads_values = observer != nullptr && !inputs_.cache.has_value_norms(s.layer);
  const Rows values = inputs_.cache.values(s);
  const int32_t n = inputs_.cache.length(segment);
  uint32_t* to = observer == nullptr ? nullptr : kept_ + kept_offsets_[static_cast<size_t>(segment)];
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
    ScanTile tile = queries_.tile(kernels_, segment, tokens, count, scratch, storage);
    const void* ahead[2 * kScanTile];
    const int next = std::min(kScanTile, n - first - count);
    keys.run(first + count, next, ahead);
    if (reads_values) values.run(first + count, next, ahead + next);
    tile.ahead = ahead;
    tile.ahead_count = reads_values ? 2 * next : next;
    tile.ahead_bytes = static_cast<int>(inputs_.cache.row_bytes());
    tile.reference = scratch.reference;
    std::fill_n(scratch.row_sums, layout().count(), 0.0f);
    kernels_.scan(tile, scratch.row_sums, to == nullptr ? nullptr : to + first * int64_t{layout().kept()});
    for (int i = 0; i < layout().count(); ++i) sums[i] += scratch.row_sums[i];
  }
}

void Attention::finish(int64_t segment, Scratch& scratch, const Observer* observer) {
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
    reference_from_all(segment, scratch);
    for (int64_t block = 0; block < blocks(segment); ++block) scan_block(segment, block, scratch, observer);
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

void Attention::run(Pool& pool, std::vector<Scratch>& scratch, Progress& progress, const Observer* observer) {
  const auto local = [&](int worker) -> Scratch& { return scratch[static_cast<size_t>(worker)]; };
  const int64_t segments = inputs_.cache.segments().count();
  pool.run(segments, [&](int64_t segment, int worker) {
    if (!progress.cancelled()) prepare(segment, local(worker));
  });
  progress.check();

  // In this order: whoever takes a task waits for none behind it. The tokens of a wave are told while the next is scanned.
  struct Task {
    int64_t segment;
    int64_t block;
    size_t wave;
    bool scans;
  };
  std::vector<Task> tasks;
  std::vector<std::atomic<int64_t>> unscanned(static_cast<size_t>(segments));  // blocks
  std::deque<std::latch> finished;                                             // segments
  std::deque<std::latch> over;                                                 // waves: their place is free
  const auto tell = [&](size_t wave) {
    for (int64_t segment = waves_[wave].first; segment < waves_[wave].last; ++segment)
      for (int64_t block = 0; block * kScannedBlock < inputs_.cache.length(segment); ++block) tasks.push_back({segment, block, wave, false});
  };
  for (size_t wave = 0; wave < waves_.size(); ++wave) {
    int64_t outstanding = 0;
    for (int64_t segment = waves_[wave].first; segment < waves_[wave].last; ++segment) {
      const int64_t scans = given(segment) && observer == nullptr ? 0 : blocks(segment);
      for (int64_t block = 0; block < scans; ++block) tasks.push_back({segment, block, wave, true});
      unscanned[static_cast<size_t>(segment)].store(scans);
      finished.emplace_back(scans == 0 ? 0 : 1);
      if (observer == nullptr)
        outstanding += scans == 0 ? 0 : 1;
      else
        outstanding += (inputs_.cache.length(segment) + kScannedBlock - 1) / kScannedBlock;
    }
    over.emplace_back(outstanding);
    if (observer != nullptr && wave > 0) tell(wave - 1);
  }
  if (observer != nullptr && !waves_.empty()) tell(waves_.size() - 1);

  // A call that is cancelled still counts down, so that nobody waits for what will not come.
  pool.run(static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    const auto [segment, block, wave, scans] = tasks[static_cast<size_t>(i)];
    std::latch& own = finished[static_cast<size_t>(segment)];
    if (!scans) {
      own.wait();
      const auto begin = static_cast<int32_t>(block * kScannedBlock);
      const int32_t end = std::min(begin + kScannedBlock, inputs_.cache.length(segment));
      if (!progress.cancelled()) observer->scanned(segment, begin, end, local(worker));
      over[wave].count_down();
      return;
    }
    if (wave >= places_) over[wave - places_].wait();
    if (!progress.cancelled()) {
      scan_block(segment, block, local(worker), observer);
      progress.advance(std::min<int64_t>(kBlock, inputs_.cache.length(segment) - block * kBlock));
    }
    if (unscanned[static_cast<size_t>(segment)].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    if (!progress.cancelled()) {
      finish(segment, local(worker), observer);
      if (observer != nullptr) weigh(segment);
    }
    own.count_down();
    if (observer == nullptr) over[wave].count_down();
  });
  progress.check();
}

}  // namespace laprox::cpu
