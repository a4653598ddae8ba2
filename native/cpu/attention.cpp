#include "cpu/attention.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <latch>
#include <limits>
#include <mutex>
#include <numeric>

namespace laprox::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kSpareSlots = 8;  // for each thread, beyond the blocks of the longest segment: how far it gets while others finish one
constexpr int kSinkSample = 4;      // the reference point: the first keys, the last of every row's own, and a stride between
constexpr int kStrideSample = 12;
constexpr double kCut = 1 + 0x1p-7;  // what cutting a float to bfloat16 may take
constexpr double kLog2E = 1.44269504088896340736;
constexpr double kOutgrown = 1e18;  // sums of e beyond which sums of e^2 come near the end of float

// Slots that are free. A thread gets back those that it gave last, which its own caches hold.
class Slots {
 public:
  Slots(int64_t count, int threads) : count_(count), given_(static_cast<size_t>(threads)) {}

  int64_t take(int worker) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t>* from = &given_[static_cast<size_t>(worker)];
    if (from->empty()) {
      if (used_ < count_) return used_++;
      from = &*std::find_if(given_.begin(), given_.end(), [](const auto& slots) { return !slots.empty(); });
    }
    const int64_t slot = from->back();
    from->pop_back();
    return slot;
  }
  void give(int64_t slot, int worker) {
    const std::lock_guard<std::mutex> lock(mutex_);
    given_[static_cast<size_t>(worker)].push_back(slot);
  }

 private:
  std::mutex mutex_;
  const int64_t count_;
  int64_t used_ = 0;
  std::vector<std::vector<int64_t>> given_;  // [threads]
};

}  // namespace

void prefetch(const Rows& rows, const int32_t* tokens, int count, int64_t row_bytes) {
  constexpr int64_t kCacheLine = 64;
  for (int i = 0; i < count; ++i) {
    const auto* row = static_cast<const std::byte*>(rows(tokens[i]));
    for (int64_t byte = 0; byte < row_bytes; byte += kCacheLine) __builtin_prefetch(row + byte);
  }
}

Attention::Attention(Workspace& workspace, const ScoreInputs& inputs, const Kernels& kernels, int threads, bool observed)
    : inputs_(inputs), kernels_(kernels), queries_(workspace, inputs.model, inputs.cache, *inputs.window, inputs.cache.segments().count(), kernels) {
  const int64_t segments = inputs.cache.segments().count();
  int64_t longest = 0;
  for (int64_t segment = 0; segment < segments; ++segment) {
    first_blocks_.push_back(static_cast<int64_t>(blocks_.size()));
    for (int32_t begin = 0; begin < inputs.cache.length(segment); begin += kBlock) blocks_.push_back({segment, begin, 0});
    longest = std::max(longest, static_cast<int64_t>(blocks_.size()) - first_blocks_.back());
  }
  first_blocks_.push_back(static_cast<int64_t>(blocks_.size()));
  slots_ = std::min(longest + threads * kSpareSlots, first_blocks_.back());
  references_ = workspace.take<float>(segments * all_rows());
  log_sums_ = workspace.take<float>(segments * all_rows());
  residuals_ = workspace.take<float>(segments * all_rows());
  weights_ = workspace.take<float>(segments * layout().count());
  kept_ = workspace.take<uint32_t>(observed ? slots_ * kBlock * layout().kept() : 0);
  sums_ = workspace.take<double>(slots_ * layout().count());
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

// The tokens whose log-sum-exp is the reference point.
std::vector<int32_t> Attention::sample(int64_t segment) const {
  const int32_t n = inputs_.cache.length(segment);
  const int32_t middle = std::max(0, n - kSinkSample - rows());
  std::vector<int32_t> tokens;
  for (int32_t t = 0; t < std::min(n, kSinkSample); ++t) tokens.push_back(t);
  for (int32_t i = 0; i < std::min(middle, kStrideSample); ++i)
    tokens.push_back(kSinkSample + static_cast<int32_t>(int64_t{middle} * i / std::min(middle, kStrideSample)));
  for (int32_t t = std::max(kSinkSample, n - rows()); t < n; ++t) tokens.push_back(t);
  return tokens;
}

void Attention::prepare(int64_t segment, Scratch& scratch) {
  const Segment s = inputs_.cache.segments().at(segment);
  const int missing = rows() - existing_rows(s);
  const std::vector<int32_t> tokens = given(segment) ? std::vector<int32_t>() : sample(segment);
  prefetch(inputs_.cache.keys(s), tokens.data(), static_cast<int>(tokens.size()), inputs_.cache.row_bytes());
  queries_.pack(kernels_, segment);
  if (given(segment)) {
    for (int r = 0; r < all_rows(); ++r) {
      set_log_sum(segment, r, r % rows() < missing ? kInfinity : inputs_.window->log2_sum(s, r / rows(), r % rows()));
      references(segment)[r] = log_sums(segment)[r];
    }
    return;
  }
  if (tokens.empty()) {
    std::fill_n(references(segment), all_rows(), kInfinity);
    std::fill_n(log_sums(segment), all_rows(), kInfinity);
    std::fill_n(residuals(segment), all_rows(), 0.0f);
    return;
  }
  reference_from(segment, tokens, scratch);
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

void Attention::scan_block(const Block& block, const Block* next, Scratch& scratch, const Observer* observer) {
  const int64_t segment = block.segment;
  const Segment s = inputs_.cache.segments().at(segment);
  const bool reads_values = observer != nullptr && !inputs_.cache.has_value_norms(s.layer);
  // Rows of the block, and the first of the next one.
  const void* keys[kBlock + kScanAhead];
  const void* values[kBlock + kScanAhead];
  int all = 0;
  const auto add_rows = [&](const Block& of, int some) {
    const Segment own = inputs_.cache.segments().at(of.segment);
    inputs_.cache.keys(own).run(of.begin, some, keys + all);
    if (reads_values) inputs_.cache.values(own).run(of.begin, some, values + all);
    all += some;
  };
  const int count = end(block) - block.begin;
  add_rows(block, count);
  if (next != nullptr) add_rows(*next, std::min(kScanAhead, end(*next) - next->begin));
  std::fill_n(scratch.reference, layout().count(), kInfinity);
  for (int r = 0; r < all_rows(); ++r) scratch.reference[queries_.packed(r)] = references(segment)[r];
  std::fill_n(sums(block), layout().count(), 0.0);
  int32_t tokens[kBlock];
  std::iota(tokens, tokens + count, block.begin);
  float* norms = reads_values ? observer->norms(segment, block.begin) : nullptr;
  for (int first = 0, some = 0; first < count; first += some) {
    // Masks take time: tokens that every row sees go by themselves.
    some = queries_.seen_by_all(segment, block.begin + first, end(block));
    if (some == 0) some = count - first;
    Visibility storage;
    ScanRun run = queries_.run(segment, tokens + first, keys + first, some, scratch, storage);
    run.ahead = std::min(kScanAhead, all - first - some);
    run.reference = scratch.reference;
    if (reads_values) {
      run.values = values + first;
      run.norms = norms + first;
    }
    kernels_.scan(run, sums(block), observer == nullptr ? nullptr : kept(block) + first * int64_t{layout().kept()});
  }
}

void Attention::finish(int64_t segment, Scratch& scratch, const Observer* observer) {
  if (given(segment)) return;
  const Segment s = inputs_.cache.segments().at(segment);
  const Layer& layer = inputs_.model.layers[static_cast<size_t>(s.layer)];
  const int count = all_rows();
  std::vector<double> totals(static_cast<size_t>(count));
  const auto add_up = [&] {
    std::fill(totals.begin(), totals.end(), 0.0);
    for (int64_t i = first_block(segment); i < first_block(segment + 1); ++i)
      for (int r = 0; r < count; ++r) totals[static_cast<size_t>(r)] += sums(block(i))[queries_.packed(r)];
  };
  add_up();
  // A token outside the sample with a logit far above it: start again from all tokens, where no term exceeds 1.
  if (std::any_of(totals.begin(), totals.end(), [](double sum) { return !(sum < kOutgrown); })) {
    reference_from_all(segment, scratch);
    for (int64_t i = first_block(segment); i < first_block(segment + 1); ++i) scan_block(block(i), nullptr, scratch, observer);
    add_up();
  }
  const float* b = references(segment);
  for (int r = 0; r < count; ++r) {
    double sum = totals[static_cast<size_t>(r)];
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

  // How far a segment is. A call that is cancelled still counts down, so that nobody waits for what will not come.
  struct Stage {
    explicit Stage(int64_t blocks) : unscanned(blocks), finished(blocks == 0 ? 0 : 1), over(blocks) {}
    std::atomic<int64_t> unscanned;  // blocks
    std::latch finished;             // its log-sum-exps are known
    std::latch over;                 // blocks: nothing is wanted any more of what the scan left
  };
  struct Thread {
    std::deque<int64_t> own;  // blocks that it scanned and has not told of
    int64_t over = 0;         // segments that it knows to be over
  };
  const auto count = static_cast<int64_t>(blocks_.size());
  const auto skipped = [&](int64_t segment) { return given(segment) && observer == nullptr; };
  std::deque<Stage> stages;
  for (int64_t segment = 0; segment < segments; ++segment)
    stages.emplace_back(skipped(segment) ? 0 : first_block(segment + 1) - first_block(segment));
  const auto stage = [&](int64_t segment) -> Stage& { return stages[static_cast<size_t>(segment)]; };
  std::vector<Thread> threads(static_cast<size_t>(pool.threads()));
  std::vector<std::atomic<bool>> told(blocks_.size());
  Slots slots(slots_, pool.threads());

  const auto tell = [&](int64_t i, int worker) {
    if (told[static_cast<size_t>(i)].exchange(true)) return;
    const Block& block = this->block(i);
    if (observer != nullptr && !progress.cancelled()) observer->scanned(block.segment, block.begin, end(block), kept(block), local(worker));
    slots.give(block.slot, worker);
    stage(block.segment).over.count_down();
  };
  // Whoever takes a block waits for none behind it.
  const auto make_room = [&](int64_t i, int worker) {
    if (i < slots_) return;
    for (int64_t& segment = threads[static_cast<size_t>(worker)].over; segment <= block(i - slots_).segment; ++segment) {
      if (skipped(segment)) continue;
      stage(segment).finished.wait();
      for (int64_t other = first_block(segment); other < first_block(segment + 1); ++other) tell(other, worker);
      stage(segment).over.wait();
    }
  };
  const auto scan = [&](int64_t i, int worker) {
    Block& block = blocks_[static_cast<size_t>(i)];
    make_room(i, worker);
    block.slot = slots.take(worker);
    if (!progress.cancelled()) {
      const int64_t next = i + pool.threads();  // threads take turns
      scan_block(block, next < count ? &this->block(next) : nullptr, local(worker), observer);
      progress.advance(end(block) - block.begin);
    }
    if (stage(block.segment).unscanned.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    if (!progress.cancelled()) {
      finish(block.segment, local(worker), observer);
      if (observer != nullptr) weigh(block.segment);
    }
    stage(block.segment).finished.count_down();
  };
  pool.run(count, [&](int64_t i, int worker) {
    if (skipped(block(i).segment)) return;
    scan(i, worker);
    std::deque<int64_t>& own = threads[static_cast<size_t>(worker)].own;
    own.push_back(i);
    for (; !own.empty() && stage(block(own.front()).segment).finished.try_wait(); own.pop_front()) tell(own.front(), worker);
  });
  pool.run(std::min(count, slots_), [&](int64_t i, int worker) {
    if (!skipped(block(count - 1 - i).segment)) tell(count - 1 - i, worker);
  });
  progress.check();
}

}  // namespace laprox::cpu
