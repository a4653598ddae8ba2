#include "cpu/ranking.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cinttypes>
#include <cmath>
#include <limits>
#include <numeric>

namespace laprox::cpu {
namespace {

constexpr uint32_t kForced = UINT32_MAX;  // protected, non-finite, or part of a floor: kept outside the ranking
constexpr float kAbsent = -std::numeric_limits<float>::infinity();
constexpr uint32_t kLeastPresent = 0x00800000u;  // the key behind that of kAbsent
constexpr int kDigits = 3;
constexpr std::array<int, kDigits> kShifts = {21, 10, 0};
constexpr std::array<int, kDigits> kBits = {11, 11, 10};
constexpr int kBins = 1 << 11;
constexpr int kCopies = 4;  // of a histogram: neighbouring scores are alike, and increments of one counter wait for each other
constexpr int64_t kPiece = 1 << 16;
constexpr int64_t kFew = 1 << 12;  // of so many keys the histograms above would cost more than the keys, and threads more than the work
constexpr int kFewBits = 8;        // of a digit of those
constexpr uint32_t kFewBins = 1 << kFewBits;
static_assert(kFew <= kCopies * kBins && kFew <= UINT16_MAX);
constexpr int64_t kSample = 1 << 11;  // keys that tell which of the others matter
constexpr double kDeviations = 4;     // of how many keys of a sample are large
static_assert(kSample <= kFew);
constexpr int64_t kGroup = 32;
constexpr int64_t kPoolFloats = 2 * (kPoolChunk + 256);

bool finite(float x) { return (std::bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }

// True where all values are finite, or what stands for an absent one.
bool clean(const float* values, int64_t count, uint32_t absent) {
  uint32_t broken = 0;
  for (int64_t i = 0; i < count; ++i)
    broken |= static_cast<uint32_t>(!finite(values[i])) & static_cast<uint32_t>(std::bit_cast<uint32_t>(values[i]) != absent);
  return broken == 0;
}

}  // namespace

float score_of(uint32_t key) {
  if (key >= 0xff800000u) return std::numeric_limits<float>::infinity();
  if (key <= 0x007fffffu) return kAbsent;
  return std::bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

Ranking::Ranking(Workspace& workspace, const ScoreLayout& layout, const lpx_select_rule& rule, const Kernels& kernels, int threads)
    : layout_(layout), rule_(rule), kernels_(kernels), threads_(threads), starts_(static_cast<size_t>(layout.segments().count()) + 1, 0) {
  for (int64_t i = 0; i < layout.segments().count(); ++i) starts_[static_cast<size_t>(i) + 1] = starts_[static_cast<size_t>(i)] + layout.length(i);
  keys_ = workspace.take<uint32_t>(layout.entries());
  picked_ = workspace.take<uint32_t>(layout.entries());
  histograms_ = workspace.take<uint32_t>(int64_t{threads} * kCopies * kBins);
  pooling_ = workspace.take<float>(threads * kPoolFloats);
}

std::vector<Ranking::Piece> Ranking::pieces(const std::vector<int64_t>& segments) const {
  std::vector<Piece> result;
  for (const int64_t segment : segments)
    for (int64_t begin = 0; begin < layout_.length(segment); begin += kPiece)
      result.push_back({segment, begin, std::min<int64_t>(begin + kPiece, layout_.length(segment))});
  return result;
}

std::vector<Ranking::Run> Ranking::runs(const std::vector<Piece>& list) const {
  std::vector<Run> result;
  for (const Piece& piece : list) result.push_back({keys(piece), piece.end - piece.begin, picked_ + (keys(piece) - keys_)});
  return result;
}

// On the calling thread where there is little to do: others take longer to wake than to work.
void Ranking::run(Pool& pool, int64_t count, const std::function<void(int64_t, int)>& task) const {
  if (layout_.entries() > kFew) return pool.run(count, task);
  for (int64_t i = 0; i < count; ++i) task(i, 0);
}

// Pooled keys of a piece. Counts its non-finite scores, and of those the ones that are not protected anyway.
void Ranking::read(const Piece& piece, const float* scores, Absent absent, int worker, int64_t& non_finite, int64_t& forced) {
  const float* own = scores + layout_.offset(piece.segment);
  const int64_t length = layout_.length(piece.segment);
  const int width = rule_.pooling == LPX_POOL_NONE ? 1 : rule_.pooling_width;
  const int halo = width / 2;
  float* in = pooling_ + worker * kPoolFloats;
  float* pooled = in + kPoolFloats / 2;
  uint32_t* to = keys(piece);
  for (int64_t first = piece.begin; first < piece.end; first += kPoolChunk, to += kPoolChunk) {
    const int64_t count = std::min<int64_t>(kPoolChunk, piece.end - first);
    const int64_t from = std::max<int64_t>(first - halo, 0);
    const int64_t until = std::min<int64_t>(first + count + halo, length);
    const int64_t before = from - (first - halo);  // neighbours that do not exist
    std::fill_n(in, before, kAbsent);
    std::copy(own + from, own + until, in + before);
    std::fill(in + before + (until - from), in + count + 2 * halo, kAbsent);
    const bool ordinary = clean(own + from, until - from, std::bit_cast<uint32_t>(absent == Absent::kMinusInfinity ? kAbsent : 0.0f));
    if (!ordinary)
      for (int64_t i = 0; i < count + 2 * halo; ++i)
        if (!finite(in[i])) in[i] = kAbsent;
    if (rule_.pooling == LPX_POOL_MEAN) {
      for (int64_t i = 0; i < count; ++i) {
        float sum = 0;
        int neighbours = 0;
        for (int j = 0; j < width; ++j) {
          if (in[i + j] == kAbsent) continue;
          sum += in[i + j];
          ++neighbours;
        }
        pooled[i] = neighbours == 0 ? kAbsent : sum / static_cast<float>(neighbours);
      }
      kernels_.pool_keys(pooled, count, 1, to);
    } else {
      kernels_.pool_keys(in, count, width, to);
    }
    for (int64_t i = 0; i < count && !ordinary; ++i) {
      const float score = own[first + i];
      if (finite(score) || (absent == Absent::kMinusInfinity && score == kAbsent)) continue;
      to[i] = kForced;
      ++non_finite;
      ++forced;
    }
  }
  for (const TokenRange range : layout_.protected_ranges(piece.segment, rule_)) {
    for (int64_t token = std::max<int64_t>(range.begin, piece.begin); token < std::min<int64_t>(range.end, piece.end); ++token) {
      uint32_t& key = keys(piece)[token - piece.begin];
      if (key == kForced) --forced;  // a non-finite score, already counted among the protected
      key = kForced;
    }
  }
}

// The k-th largest of a few keys. Digits begin at the first bit that tells keys apart, and keys that share the digits found so
// far move together, so that the next digit looks at no other.
Threshold Ranking::find_among_few(uint32_t* few, int64_t count, int64_t k) {
  uint32_t in_all = UINT32_MAX;
  uint32_t in_any = 0;
  for (int64_t i = 0; i < count; ++i) {
    in_all &= few[i];
    in_any |= few[i];
  }
  for (int shift = std::max(static_cast<int>(std::bit_width(in_all ^ in_any)) - kFewBits, 0);; shift = std::max(shift - kFewBits, 0)) {
    const auto digit = [shift](uint32_t key) { return key >> shift & (kFewBins - 1); };
    std::array<std::array<uint16_t, kFewBins>, kCopies> histogram{};
    int64_t i = 0;
    for (; i + kCopies <= count; i += kCopies)
      for (size_t copy = 0; copy < kCopies; ++copy) ++histogram[copy][digit(few[i + static_cast<int64_t>(copy)])];
    for (; i < count; ++i) ++histogram[0][digit(few[i])];
    uint32_t bin = kFewBins - 1;
    for (;; --bin) {
      int64_t entries = 0;
      for (const auto& copy : histogram) entries += copy[bin];
      if (entries >= k) break;
      k -= entries;
    }
    int64_t same = 0;
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t key = few[j];
      few[same] = key;
      same += digit(key) == bin;
    }
    if (shift == 0) return {few[0], k};
    count = same;
  }
}

// A key that somewhat more than k keys reach, judging by some of them; where they tell nothing, that of any score.
uint32_t Ranking::guess(const std::vector<Run>& runs, int64_t size, int64_t k, int worker) {
  uint32_t* few = histograms_ + int64_t{worker} * kCopies * kBins;
  const int64_t step = size / kSample + 1;
  int64_t count = 0;
  int64_t next = 0;
  for (const Run& run : runs) {
    for (; next < run.count; next += step) {
      few[count] = run.keys[next];
      count += run.keys[next] != kForced;
    }
    next -= run.count;
  }
  const double expected = static_cast<double>(k) / static_cast<double>(step);
  const auto rank = static_cast<int64_t>(std::ceil(expected + kDeviations * std::sqrt(expected) + 1));
  return rank > count ? kLeastPresent : std::max(find_among_few(few, count, rank).key, kLeastPresent);
}

// Keys below what is surely too small are left behind; digit by digit from the top, which bin holds the k-th largest of the rest.
Threshold Ranking::find(Pool& pool, const std::vector<Run>& runs, int64_t k, int worker) {
  if (k <= 0) return {kForced - 1, 0};  // above every key that is ranked
  int64_t size = 0;
  for (const Run& run : runs) size += run.count;
  const bool parallel = worker < 0 && size > kFew;
  const int first = std::max(worker, 0);
  const int last = parallel ? threads_ : first + 1;
  const auto for_each = [&](const std::function<void(int64_t, int)>& task) {
    if (parallel) return pool.run(static_cast<int64_t>(runs.size()), task);
    for (size_t i = 0; i < runs.size(); ++i) task(static_cast<int64_t>(i), first);
  };
  std::vector<int64_t> counts(runs.size());
  int64_t total = 0;
  for (uint32_t least = size > kFew ? guess(runs, size, k, first) : 0;; least = 0) {
    for_each([&](int64_t i, int) {
      const Run& run = runs[static_cast<size_t>(i)];
      counts[static_cast<size_t>(i)] = kernels_.pick_keys(run.keys, run.count, least, kForced - 1, run.picked);
    });
    total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    if (total >= k) break;
    if (least == 0) return {0, 0};  // all are above
  }
  uint32_t* histogram = histograms_ + int64_t{first} * kCopies * kBins;
  if (total <= kFew) {
    uint32_t* to = histogram;
    for (size_t i = 0; i < runs.size(); ++i) to = std::copy_n(runs[i].picked, counts[i], to);
    return find_among_few(histogram, total, k);
  }
  uint32_t prefix = 0;
  uint32_t known = 0;  // mask of the digits that are found
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = kShifts[static_cast<size_t>(digit)];
    const uint32_t bins = 1u << kBits[static_cast<size_t>(digit)];
    std::fill(histogram, histograms_ + int64_t{last} * kCopies * kBins, 0u);
    for_each([&](int64_t i, int thread) {
      const uint32_t* key = runs[static_cast<size_t>(i)].picked;
      const int64_t count = counts[static_cast<size_t>(i)];
      uint32_t* own = histograms_ + int64_t{thread} * kCopies * kBins;
      if (digit == 0) {
        for (int64_t j = 0; j < count; ++j) ++own[(j % kCopies) * kBins + (key[j] >> shift)];
        return;
      }
      // Few keys share the digits that are known: most groups are passed over without a branch a key.
      for (int64_t begin = 0; begin < count; begin += kGroup) {
        const int64_t end = std::min(begin + kGroup, count);
        uint32_t any = 0;
        for (int64_t j = begin; j < end; ++j) any |= static_cast<uint32_t>((key[j] & known) == prefix);
        if (any == 0) continue;
        for (int64_t j = begin; j < end; ++j)
          if ((key[j] & known) == prefix) ++own[(key[j] >> shift) & (bins - 1)];
      }
    });
    uint32_t bin = bins - 1;
    for (;; --bin) {
      int64_t entries = 0;
      for (int copy = first * kCopies; copy < last * kCopies; ++copy) entries += histograms_[int64_t{copy} * kBins + bin];
      if (entries >= k) break;
      k -= entries;
    }
    prefix |= bin << shift;
    known |= (bins - 1) << shift;
  }
  return {prefix, k};
}

// The best `count` ranked entries of a segment join those that are kept outside the ranking.
void Ranking::take_floor(Pool& pool, int64_t segment, int64_t count, int worker) {
  const std::vector<Piece> list = pieces({segment});
  Threshold threshold = find(pool, runs(list), count, worker);
  floor_thresholds_[static_cast<size_t>(segment)] = score_of(threshold.key);
  for (const Piece& piece : list) {
    for (int64_t i = 0; i < piece.end - piece.begin; ++i) {
      uint32_t& key = keys(piece)[i];
      if (key == kForced || key < threshold.key || (key == threshold.key && threshold.ties-- <= 0)) continue;
      key = kForced;
    }
  }
}

float Ranking::lower_bound(size_t part, int64_t segment) const {
  return floor_thresholds_.empty() ? lower_bounds_[part] : std::min(lower_bounds_[part], floor_thresholds_[static_cast<size_t>(segment)]);
}

int64_t Ranking::unprotected(const std::vector<Piece>& list) const {
  int64_t count = 0;
  for (const Piece& piece : list)
    count += std::count_if(keys(piece), keys(piece) + (piece.end - piece.begin), [](uint32_t key) { return key != kForced; });
  return count;
}

void Ranking::rank(Pool& pool, const std::vector<Part>& parts, const float* scores, Absent absent, Progress& progress) {
  std::vector<int64_t> segments(static_cast<size_t>(layout_.segments().count()));
  std::iota(segments.begin(), segments.end(), int64_t{0});
  const std::vector<Piece> all = pieces(segments);
  std::vector<int64_t> non_finite(all.size(), 0);
  std::vector<int64_t> forced(all.size(), 0);
  run(pool, static_cast<int64_t>(all.size()), [&](int64_t i, int worker) {
    const auto index = static_cast<size_t>(i);
    if (!progress.cancelled()) read(all[index], scores, absent, worker, non_finite[index], forced[index]);
  });
  progress.check();
  non_finite_ = std::accumulate(non_finite.begin(), non_finite.end(), int64_t{0});
  std::vector<int64_t> forced_of(segments.size(), 0);
  for (size_t i = 0; i < all.size(); ++i) forced_of[static_cast<size_t>(all[i].segment)] += forced[i];
  if (non_finite_ > 0 && rule_.non_finite == LPX_NON_FINITE_ERROR) {
    for (size_t i = 0; i < all.size(); ++i) {
      if (non_finite[i] == 0) continue;
      const Segment s = layout_.segments().at(all[i].segment);
      const float* own = scores + layout_.offset(all[i].segment);
      int64_t token = all[i].begin;
      while (finite(own[token]) || (absent == Absent::kMinusInfinity && own[token] == kAbsent)) ++token;
      fail(LPX_NON_FINITE,
           "%" PRId64 " score(s) are not finite, the first %g at (layer %d, sequence %d, head %d, token %" PRId64
           "): expected finite scores, or nonFinite 'keep'",
           non_finite_, own[token], s.layer, s.sequence, s.head, token);
    }
  }

  thresholds_.assign(parts.size(), {kForced - 1, 0});
  floor_thresholds_.clear();
  std::vector<int64_t> ranked(parts.size());  // entries still to be chosen
  std::vector<std::pair<int64_t, int64_t>> floors;
  for (size_t p = 0; p < parts.size(); ++p) {
    int64_t taken = parts[p].protected_entries;
    for (const int64_t segment : parts[p].segments) taken += forced_of[static_cast<size_t>(segment)];
    if (taken > parts[p].quota) {
      const Segment s = layout_.segments().at(parts[p].segments.front());
      fail(LPX_BUDGET_TOO_SMALL,
           "%" PRId64 " entries must be kept of sequence %d from layer %d, head %d on (%" PRId64
           " protected, the rest not finite), above the budget of %" PRId64,
           taken, s.sequence, s.layer, s.head, parts[p].protected_entries, parts[p].quota);
    }
    ranked[p] = parts[p].quota - taken;
    const auto share = static_cast<int64_t>(std::floor(rule_.floor * static_cast<double>(ranked[p]) / static_cast<double>(parts[p].segments.size())));
    if (share > 0)
      for (const int64_t segment : parts[p].segments) floors.emplace_back(segment, share);
  }
  const auto find_all = [&] {
    // Large parts one after another on all threads, small ones side by side.
    std::vector<size_t> small;
    for (size_t p = 0; p < parts.size(); ++p) {
      if (parts[p].entries > 2 * kPiece)
        thresholds_[p] = find(pool, runs(pieces(parts[p].segments)), ranked[p], -1);
      else
        small.push_back(p);
      progress.check();
    }
    run(pool, static_cast<int64_t>(small.size()), [&](int64_t i, int worker) {
      const size_t p = small[static_cast<size_t>(i)];
      thresholds_[p] = find(pool, runs(pieces(parts[p].segments)), ranked[p], worker);
    });
  };
  const auto note_bounds = [&] {
    for (size_t p = 0; p < parts.size(); ++p) lower_bounds_[p] = score_of(thresholds_[p].key);
  };
  lower_bounds_.resize(parts.size());
  if (!floors.empty()) {
    if (absent == Absent::kMinusInfinity) {
      find_all();
      note_bounds();
    }
    floor_thresholds_.assign(segments.size(), std::numeric_limits<float>::infinity());
    std::vector<int64_t> before(floors.size());
    run(pool, static_cast<int64_t>(floors.size()), [&](int64_t i, int worker) {
      const auto index = static_cast<size_t>(i);
      const int64_t available = unprotected(pieces({floors[index].first}));
      before[index] = std::min(available, floors[index].second);
      take_floor(pool, floors[index].first, before[index], worker);
    });
    size_t next = 0;
    for (size_t p = 0; p < parts.size(); ++p)
      for (size_t i = 0; i < parts[p].segments.size() && next < floors.size() && floors[next].first == parts[p].segments[i]; ++i)
        ranked[p] -= before[next++];
  }

  find_all();
  if (floors.empty()) note_bounds();
}

void Ranking::emit(Pool& pool, const std::vector<Part>& parts, const lpx_selection& out) {
  struct Kept {
    Piece piece;
    size_t part;
    int64_t above;
    int64_t equal;
    int64_t ties;    // of its ties, kept
    int64_t offset;  // of its first kept token
  };
  std::vector<Kept> runs;
  for (size_t p = 0; p < parts.size(); ++p)
    for (const Piece& piece : pieces(parts[p].segments)) runs.push_back({piece, p, 0, 0, 0, 0});
  run(pool, static_cast<int64_t>(runs.size()), [&](int64_t i, int) {
    Kept& run = runs[static_cast<size_t>(i)];
    const uint32_t* key = keys(run.piece);
    const uint32_t threshold = thresholds_[run.part].key;
    int64_t above = 0;
    int64_t equal = 0;
    for (int64_t t = 0; t < run.piece.end - run.piece.begin; ++t) {
      above += key[t] > threshold;
      equal += key[t] == threshold;
    }
    run.above = above;
    run.equal = equal;
  });
  // Ties go to the smaller (layer, head, token): runs of a part are in that order.
  std::vector<int64_t> ties(parts.size());
  for (size_t p = 0; p < parts.size(); ++p) ties[p] = thresholds_[p].ties;
  for (Kept& run : runs) {
    run.ties = std::min(run.equal, ties[run.part]);
    ties[run.part] -= run.ties;
  }
  std::sort(runs.begin(), runs.end(), [](const Kept& a, const Kept& b) {
    return a.piece.segment != b.piece.segment ? a.piece.segment < b.piece.segment : a.piece.begin < b.piece.begin;
  });
  int64_t offset = 0;
  int64_t segment = 0;
  for (Kept& run : runs) {
    while (segment <= run.piece.segment) out.offsets[segment++] = offset;
    run.offset = offset;
    offset += run.above + run.ties;
  }
  while (segment <= layout_.segments().count()) out.offsets[segment++] = offset;
  run(pool, static_cast<int64_t>(runs.size()), [&](int64_t i, int) {
    Kept& run = runs[static_cast<size_t>(i)];
    const uint32_t* key = keys(run.piece);
    const uint32_t threshold = thresholds_[run.part].key;
    int32_t* to = out.tokens + run.offset;
    int32_t picked[kPoolChunk];
    const int64_t size = run.piece.end - run.piece.begin;
    for (int64_t first = 0; first < size; first += kPoolChunk) {
      const int64_t count = kernels_.pick(key + first, std::min<int64_t>(kPoolChunk, size - first), threshold, UINT32_MAX, picked);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = first + picked[i];
        if (key[t] == threshold && run.ties-- <= 0) continue;
        *to++ = static_cast<int32_t>(run.piece.begin + t);
      }
    }
  });
}

uint32_t Ranking::kth_largest(Pool& pool, const Part& part, const uint32_t* values, int64_t k) {
  std::vector<Run> list = runs(pieces(part.segments));
  for (Run& run : list) run.keys = values + (run.keys - keys_);
  return std::min(find(pool, list, k, -1).key, std::bit_cast<uint32_t>(std::numeric_limits<float>::max()));
}

}  // namespace laprox::cpu
