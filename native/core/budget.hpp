// How many entries each part of a sequence keeps, and which tokens are protected: all that is known before any score is.
#pragma once

#include <cstdint>
#include <vector>

#include "core/geometry.hpp"
#include "laprox/laprox.h"

namespace laprox {

struct TokenRange {
  int32_t begin;
  int32_t end;
};

// Lengths, offsets and positions of all segments' scores, checked.
class ScoreLayout {
 public:
  explicit ScoreLayout(const lpx_scores* scores, bool needs_data = true);

  const lpx_scores& desc() const { return *desc_; }
  const Segments& segments() const { return segments_; }
  int32_t length(int64_t segment) const { return desc_->lengths[segment]; }
  int64_t offset(int64_t segment) const { return desc_->offsets[segment]; }
  float* scores(int64_t segment) const { return desc_->data + offset(segment); }
  int64_t entries() const { return entries_; }
  int64_t max_length() const { return max_length_; }
  // Protected tokens of a segment: disjoint, ascending.
  std::vector<TokenRange> protected_ranges(int64_t segment, const lpx_select_rule& rule) const;

 private:
  const lpx_scores* desc_;
  Segments segments_;
  int64_t entries_ = 0;
  int64_t max_length_ = 0;
};

// Entries that compete for one budget: a sequence, a layer of it, or a head of a layer.
struct Part {
  std::vector<int64_t> segments;  // ascending by (layer, head)
  int64_t entries = 0;
  int64_t protected_entries = 0;
  int64_t quota = 0;  // entries kept, protected ones included
};

void check_rule(const lpx_select_rule* rule);

// Parts of all sequences, sequence by sequence. BUDGET_TOO_SMALL where a quota is below its protected entries.
std::vector<Part> budget_parts(const ScoreLayout& layout, const lpx_select_rule& rule);

}  // namespace laprox
