// The query rows of a window, packed for the kernels, and what they see: attention of all rows of a segment on tiles of its tokens,
// by a given reference point.
#pragma once

#include <cstdint>
#include <vector>

#include "core/geometry.hpp"
#include "core/model.hpp"
#include "cpu/tile.hpp"
#include "cpu/workspace.hpp"

namespace laprox::cpu {

// How `scan` takes the query rows of a segment. Each head has its rows in `parts` lanes, one row of each part a vector, so that sums over
// a head are sums over the vectors of a chunk, and then over few lanes.
class RowLayout {
 public:
  RowLayout(int heads, int rows, const Kernels& kernels);

  int parts() const { return parts_; }      // of a head
  int chunks() const { return chunks_; }    // of `vectors` vectors
  int vectors() const { return vectors_; }  // rows of a part
  int count() const { return chunks_ * vectors_ * lanes_; }
  // What `scan` keeps of a token, in 32 bits each.
  int kept() const { return (chunks_ * vectors_ + 1) / 2 * lanes_; }
  // Sums of squares of a token, a part each: head after head, then what fills the last chunk, in whole eights.
  int squares() const { return (chunks_ * lanes_ + 7) / 8 * 8; }
  // Where row q of head h is in a vector of all rows.
  int index(int head, int row) const {
    const int at = head * parts_ + row / vectors_;
    return (at / lanes_ * vectors_ + row % vectors_) * lanes_ + at % lanes_;
  }

 private:
  int lanes_;
  int parts_ = 0;
  int chunks_ = 0;
  int vectors_ = 0;
};

// Buffers of one thread, for one tile.
struct Scratch {
  Scratch(Workspace& workspace, const ModelShape& model, int window_rows, const Kernels& kernels);

  float* logits;  // [R * m] rows
  float* values;
  float* columns;  // [R * kFactorColumns] rows
  float* attention_pairs;
  float* value_pairs;
  float* heads;      // [R]
  float* sums;       // [kTile][RowLayout::squares()]
  float* squares;    // the same as a tile
  float* reference;  // [RowLayout::count()], as are the next two
  float* largest;
  float* row_sums;
  uint16_t* room;  // for keys: room_size(d)
  float* plain;    // [kTile][d]
  float* panels;   // [kFactorColumns rounded up to panels][d]
  const void* rows[kScanTile];
  int32_t positions[kScanRun];
};

std::vector<Scratch> scratch_of_threads(Workspace& workspace, const ModelShape& model, int window_rows, const Kernels& kernels, int threads);

class Queries {
 public:
  // Has room for the rows of `segments` consecutive segments at a time.
  Queries(Workspace& workspace, const ModelShape& model, const Cache& cache, const Window& window, int64_t segments, const Kernels& kernels);

  int rows() const { return rows_; }    // m
  int heads() const { return heads_; }  // R
  const RowLayout& layout() const { return layout_; }
  // Where `scan` and `sample` have row r = h * m + q.
  int packed(int row) const { return packed_[static_cast<size_t>(row)]; }
  // Rows of a segment that exist: the last ones.
  int existing_rows(Segment s) const;

  void pack(const Kernels& kernels, int64_t segment);
  // How many of the tokens [begin, end) every row sees, before the first that one does not see.
  int seen_by_all(int64_t segment, int32_t begin, int32_t end) const;
  // Up to kScanRun tokens, ascending, for `scan` and `sample`; `keys` are theirs. The reference, values and what to ask for are left to the
  // caller. Lives in `keys`, `scratch` and `storage`.
  ScanRun run(int64_t segment, const int32_t* tokens, const void* const* keys, int count, Scratch& scratch, Visibility& storage) const;
  // out[R * m] = log2 of the sum of 2^logit over tokens, which ascend; -inf for rows that do not exist or see none of them.
  void log_sums(const Kernels& kernels, int64_t segment, const int32_t* tokens, int64_t count, float* out, Scratch& scratch) const;
  // Up to kTile tokens, ascending: scratch.logits = 2^(logit - reference - residual), 0 where a row does not see a token. Reference
  // and residual (or null) are [R * m], in base 2.
  void attend(const Kernels& kernels, int64_t segment, const int32_t* tokens, int count, const float* reference, const float* residual,
              Scratch& scratch) const;

 private:
  const Visibility* mask(int64_t segment, const int32_t* tokens, int count, Scratch& scratch, Visibility& storage) const;
  // The position of the first row, or before the first.
  int32_t first_position(Segment s) const { return end(s) - rows_; }
  // The position behind that of the last row.
  int32_t end(Segment s) const { return cache_.context(s) + window_.ahead(); }
  std::byte* ordered(int64_t segment) const { return ordered_ + segment % segments_ * ordered_bytes_; }
  float* scanned(int64_t segment) const { return scanned_ + segment % segments_ * static_cast<int64_t>(unpacked_.size()) * model_.head_dim; }
  uint16_t* split(int64_t segment) const {
    return split_ == nullptr ? nullptr : split_ + segment % segments_ * static_cast<int64_t>(unpacked_.size()) * split_size_;
  }
  bool& in_float(int64_t segment) const { return in_float_[segment % segments_]; }

  const ModelShape& model_;
  const Cache& cache_;
  const Window& window_;
  int64_t segments_;
  int rows_;
  int heads_;
  RowLayout layout_;
  std::vector<int32_t> packed_;       // [R * m] RowLayout::index
  std::vector<int32_t> unpacked_;     // rows in that order, in whole tiles; -1 where there is none
  std::vector<int32_t> window_rows_;  // of packed rows
  int split_size_;                    // numbers of a row once it is split
  int64_t ordered_bytes_;
  std::byte* ordered_;         // [segments] packed for `logits`
  float* scanned_;             // [segments] packed for `sample` and `scan`
  uint16_t* split_ = nullptr;  // [segments] the same, split, if the kernels do that
  bool* in_float_;             // [segments] they could not be split
};

}  // namespace laprox::cpu
