#include "core/budget.hpp"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <numeric>

#include "core/status.hpp"

namespace laprox {

ScoreLayout::ScoreLayout(const lpx_scores* scores, bool needs_data) : desc_(scores) {
  check_struct(scores, "scores");
  if (scores->layers < 1 || scores->sequences < 1 || scores->kv_heads < 1)
    fail(LPX_INVALID_ARGUMENT, "scores have %d layers, %d sequences and %d KV heads; expected 1 or more of each", scores->layers, scores->sequences,
         scores->kv_heads);
  if (scores->lengths == nullptr || scores->offsets == nullptr) fail(LPX_INVALID_ARGUMENT, "scores->lengths and scores->offsets are required");
  segments_ = {scores->layers, scores->sequences, scores->kv_heads};
  int64_t end = 0;
  for (int64_t i = 0; i < segments_.count(); ++i) {
    const int32_t length = scores->lengths[i];
    const Segment s = segments_.at(i);
    if (length < 0) fail(LPX_OUT_OF_BOUNDS, "length %d of (layer %d, sequence %d, head %d); expected 0 or more", length, s.layer, s.sequence, s.head);
    if (scores->offsets[i] < end)
      fail(LPX_OVERLAP, "scores of (layer %d, sequence %d, head %d) start at %" PRId64 ", before the end of the segment before, %" PRId64, s.layer,
           s.sequence, s.head, scores->offsets[i], end);
    end = scores->offsets[i] + length;
    if (end > scores->count)
      fail(LPX_OUT_OF_BOUNDS, "scores of (layer %d, sequence %d, head %d) end at %" PRId64 "; the buffer has %" PRId64, s.layer, s.sequence, s.head,
           end, scores->count);
    entries_ += length;
    max_length_ = std::max<int64_t>(max_length_, length);
  }
  if (needs_data && entries_ > 0 && scores->data == nullptr) fail(LPX_INVALID_ARGUMENT, "scores->data is NULL");
  if (scores->positions != nullptr && scores->context_lengths == nullptr)
    fail(LPX_INVALID_ARGUMENT, "scores->context_lengths is NULL, but scores have positions: say how many tokens each sequence has read");
}

std::vector<TokenRange> ScoreLayout::protected_ranges(int64_t segment, const lpx_select_rule& rule) const {
  const int32_t n = length(segment);
  const int32_t* positions = desc_->positions == nullptr ? nullptr : desc_->positions + offset(segment);
  const int64_t context = positions == nullptr ? n : desc_->context_lengths[segments_.at(segment).sequence];
  const auto token_of = [&](int64_t position) -> int32_t {  // the first token at or after a position
    if (positions == nullptr) return static_cast<int32_t>(std::clamp<int64_t>(position, 0, n));
    return static_cast<int32_t>(std::lower_bound(positions, positions + n, position) - positions);
  };
  std::vector<TokenRange> ranges;
  const auto add = [&](int64_t begin, int64_t end) {
    const TokenRange range{token_of(begin), token_of(end)};
    if (range.begin < range.end) ranges.push_back(range);
  };
  add(0, rule.sinks);
  add(context - rule.recent, INT64_C(1) << 40);
  for (int i = 0; i < rule.pinned_count; ++i) add(rule.pinned[i].begin, rule.pinned[i].end);
  std::sort(ranges.begin(), ranges.end(), [](TokenRange a, TokenRange b) { return a.begin < b.begin; });
  std::vector<TokenRange> merged;
  for (const TokenRange range : ranges) {
    if (!merged.empty() && range.begin <= merged.back().end)
      merged.back().end = std::max(merged.back().end, range.end);
    else
      merged.push_back(range);
  }
  return merged;
}

void check_rule(const lpx_select_rule* rule) {
  check_struct(rule, "rule");
  if (rule->pooling != LPX_POOL_NONE && rule->pooling != LPX_POOL_MAX && rule->pooling != LPX_POOL_MEAN)
    fail(LPX_INVALID_ARGUMENT, "rule->pooling is %d; expected LPX_POOL_NONE, LPX_POOL_MAX or LPX_POOL_MEAN", static_cast<int>(rule->pooling));
  if (rule->pooling != LPX_POOL_NONE && (rule->pooling_width < 1 || rule->pooling_width > 255 || rule->pooling_width % 2 == 0))
    fail(LPX_INVALID_ARGUMENT, "rule->pooling_width is %d; expected an odd number from 1 to 255", rule->pooling_width);
  if (rule->scope != LPX_SCOPE_MODEL && rule->scope != LPX_SCOPE_LAYER && rule->scope != LPX_SCOPE_HEAD)
    fail(LPX_INVALID_ARGUMENT, "rule->scope is %d; expected LPX_SCOPE_MODEL, LPX_SCOPE_LAYER or LPX_SCOPE_HEAD", static_cast<int>(rule->scope));
  switch (rule->budget) {
    case LPX_BUDGET_RATIO:
      if (!(rule->ratio > 0 && rule->ratio <= 1))
        fail(LPX_INVALID_ARGUMENT, "rule->ratio is %g; expected a share to keep, above 0 and at most 1", rule->ratio);
      break;
    case LPX_BUDGET_ENTRIES:
    case LPX_BUDGET_BYTES:
      if (rule->amount < 0) fail(LPX_INVALID_ARGUMENT, "rule->amount is %" PRId64 "; expected 0 or more", rule->amount);
      break;
    default: fail(LPX_INVALID_ARGUMENT, "rule->budget is %d; expected LPX_BUDGET_RATIO, _ENTRIES or _BYTES", static_cast<int>(rule->budget));
  }
  if (!(rule->floor >= 0 && rule->floor <= 1)) fail(LPX_INVALID_ARGUMENT, "rule->floor is %g; expected 0 to 1", rule->floor);
  if (rule->pyramid_beta != 0) {
    if (!(rule->pyramid_beta >= 1 && rule->pyramid_beta < 1e9))
      fail(LPX_INVALID_ARGUMENT, "rule->pyramid_beta is %g; expected 1 or more, or 0 for even budgets", rule->pyramid_beta);
    if (rule->scope != LPX_SCOPE_HEAD) fail(LPX_INVALID_ARGUMENT, "rule->pyramid_beta is set; expected LPX_SCOPE_HEAD with it");
  }
  if (rule->sinks < 0) fail(LPX_INVALID_ARGUMENT, "rule->sinks is %d; expected 0 or more", rule->sinks);
  if (rule->recent < 0) fail(LPX_INVALID_ARGUMENT, "rule->recent is %d; expected 0 or more", rule->recent);
  if (rule->pinned_count < 0 || (rule->pinned_count > 0 && rule->pinned == nullptr))
    fail(LPX_INVALID_ARGUMENT, "rule->pinned_count is %d, with %s ranges", rule->pinned_count, rule->pinned == nullptr ? "no" : "given");
  for (int i = 0; i < rule->pinned_count; ++i)
    if (rule->pinned[i].begin < 0 || rule->pinned[i].end < rule->pinned[i].begin)
      fail(LPX_INVALID_ARGUMENT, "rule->pinned[%d] is [%d, %d); expected 0 <= begin <= end", i, rule->pinned[i].begin, rule->pinned[i].end);
  if (rule->non_finite != LPX_NON_FINITE_ERROR && rule->non_finite != LPX_NON_FINITE_KEEP)
    fail(LPX_INVALID_ARGUMENT, "rule->non_finite is %d; expected LPX_NON_FINITE_ERROR or LPX_NON_FINITE_KEEP", static_cast<int>(rule->non_finite));
}

namespace {

// Shares of `total` by length: floors first, then one each to the largest fractions, ties to the earlier part.
void share_by_length(std::vector<Part>& parts, size_t first, int64_t total) {
  int64_t entries = 0;
  for (size_t i = first; i < parts.size(); ++i) entries += parts[i].entries;
  if (total >= entries) {
    for (size_t i = first; i < parts.size(); ++i) parts[i].quota = parts[i].entries;
    return;
  }
  std::vector<int64_t> remainders(parts.size() - first);
  int64_t left = total;
  for (size_t i = first; i < parts.size(); ++i) {
    const auto product = static_cast<unsigned __int128>(total) * static_cast<unsigned __int128>(parts[i].entries);
    parts[i].quota = static_cast<int64_t>(product / static_cast<unsigned __int128>(entries));
    remainders[i - first] = static_cast<int64_t>(product % static_cast<unsigned __int128>(entries));
    left -= parts[i].quota;
  }
  std::vector<size_t> order(remainders.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return remainders[a] != remainders[b] ? remainders[a] > remainders[b] : a < b; });
  for (size_t i = 0; i < static_cast<size_t>(left); ++i) ++parts[first + order[i]].quota;
}

// PyramidKV (Cai et al. 2024): unprotected budgets fall linearly from the first layer to the last, where they are 1/beta of
// the even share. Floors, then what is missing to the total goes one each to the earliest (layer, head) with room; what is
// above it (layers of unequal length) is taken one each from the latest with more than its protected entries.
void reshape_as_pyramid(std::vector<Part>& parts, size_t first, const Segments& segments, double beta) {
  int64_t missing = 0;
  for (size_t i = first; i < parts.size(); ++i) {
    Part& part = parts[i];
    const int layer = segments.at(part.segments.front()).layer;
    const double slope = segments.layers == 1 ? 0.5 : static_cast<double>(layer) / (segments.layers - 1);
    const double factor = (2 - 1 / beta) - slope * (2 - 2 / beta);
    const int64_t even = part.quota;
    const int64_t own = part.protected_entries + static_cast<int64_t>(std::floor(static_cast<double>(even - part.protected_entries) * factor));
    part.quota = std::min(own, part.entries);
    missing += even - part.quota;
  }
  for (bool room = true; missing > 0 && room;) {
    room = false;
    for (size_t i = first; i < parts.size() && missing > 0; ++i) {
      if (parts[i].quota >= parts[i].entries) continue;
      ++parts[i].quota;
      --missing;
      room = true;
    }
  }
  while (missing < 0) {
    for (size_t i = parts.size(); i-- > first && missing < 0;) {
      if (parts[i].quota <= parts[i].protected_entries) continue;
      --parts[i].quota;
      ++missing;
    }
  }
}

void check_protected(const std::vector<Part>& parts, size_t first, const Segments& segments, const lpx_select_rule& rule) {
  for (size_t i = first; i < parts.size(); ++i) {
    const Part& part = parts[i];
    if (part.quota >= part.protected_entries) continue;
    const Segment s = segments.at(part.segments.front());
    char where[64] = "";
    if (rule.scope == LPX_SCOPE_LAYER) std::snprintf(where, sizeof where, ", layer %d", s.layer);
    if (rule.scope == LPX_SCOPE_HEAD) std::snprintf(where, sizeof where, ", layer %d, head %d", s.layer, s.head);
    fail(LPX_BUDGET_TOO_SMALL,
         "the budget of sequence %d%s is %" PRId64 " of %" PRId64 " entries, but %" PRId64
         " are protected (sinks %d, recent %d, %d pinned range(s)): raise the budget or protect less",
         s.sequence, where, part.quota, part.entries, part.protected_entries, rule.sinks, rule.recent, rule.pinned_count);
  }
}

}  // namespace

std::vector<Part> budget_parts(const ScoreLayout& layout, const lpx_select_rule& rule) {
  const Segments& segments = layout.segments();
  if (rule.budget == LPX_BUDGET_BYTES && layout.desc().bytes_per_entry < 1)
    fail(LPX_INVALID_ARGUMENT, "scores->bytes_per_entry is %" PRId64 "; a budget in bytes needs the size of a key and a value row",
         layout.desc().bytes_per_entry);
  std::vector<Part> parts;
  for (int sequence = 0; sequence < segments.sequences; ++sequence) {
    const size_t first = parts.size();
    for (int layer = 0; layer < segments.layers; ++layer) {
      for (int head = 0; head < segments.heads; ++head) {
        if (parts.size() == first || rule.scope == LPX_SCOPE_HEAD || (rule.scope == LPX_SCOPE_LAYER && head == 0)) parts.emplace_back();
        Part& part = parts.back();
        const int64_t segment = segments.index({layer, sequence, head});
        part.segments.push_back(segment);
        part.entries += layout.length(segment);
        for (const TokenRange range : layout.protected_ranges(segment, rule)) part.protected_entries += range.end - range.begin;
      }
    }
    if (rule.budget == LPX_BUDGET_RATIO) {
      for (size_t i = first; i < parts.size(); ++i)
        parts[i].quota = static_cast<int64_t>(std::floor(rule.ratio * static_cast<double>(parts[i].entries)));
    } else {
      share_by_length(parts, first, rule.budget == LPX_BUDGET_ENTRIES ? rule.amount : rule.amount / layout.desc().bytes_per_entry);
    }
    check_protected(parts, first, segments, rule);
    if (rule.pyramid_beta != 0) reshape_as_pyramid(parts, first, segments, rule.pyramid_beta);
  }
  return parts;
}

}  // namespace laprox
