// Shapes: segments, tensors of a caller, and where each row of a cache lies. Everything here is checked once, then trusted.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "laprox/laprox.h"

namespace laprox {

inline constexpr int kMaxHeadDim = 256;
inline constexpr int kMaxWindow = 128;
inline constexpr int kMaxGroup = 64;

constexpr size_t element_size(lpx_dtype dtype) { return dtype == LPX_F32 ? 4 : 2; }
const char* dtype_name(lpx_dtype dtype);
void check_dtype(lpx_dtype dtype, const char* name);

// One (layer, sequence, KV head).
struct Segment {
  int layer;
  int sequence;
  int head;
};

struct Segments {
  int layers = 0;
  int sequences = 0;
  int heads = 0;

  int64_t count() const { return int64_t{layers} * sequences * heads; }
  int64_t index(Segment s) const { return (int64_t{s.layer} * sequences + s.sequence) * heads + s.head; }
  Segment at(int64_t index) const {
    return {static_cast<int>(index / heads / sequences), static_cast<int>(index / heads % sequences), static_cast<int>(index % heads)};
  }
};

// The rows of one plane and segment: finds the address of a token's row.
class Rows {
 public:
  Rows() = default;
  Rows(const lpx_plane& plane, const lpx_cache_layer& layer, int sequence, int head)
      : base_(static_cast<std::byte*>(plane.data) + head * plane.head_stride),
        page_stride_(plane.page_stride),
        token_stride_(plane.token_stride),
        page_size_(layer.page_size),
        page_shift_(std::has_single_bit(static_cast<uint32_t>(layer.page_size)) ? std::countr_zero(static_cast<uint32_t>(layer.page_size)) : -1),
        table_(layer.page_table == nullptr ? nullptr : layer.page_table + sequence * layer.table_sequence_stride + head * layer.table_head_stride),
        sequence_(sequence) {}

  std::byte* operator()(int64_t token) const {
    if (token < page_size_) return page_start(0) + token * token_stride_;
    const int64_t page = page_shift_ >= 0 ? token >> page_shift_ : token / page_size_;  // a division costs as much as a row
    return page_start(page) + (token - page * page_size_) * token_stride_;
  }

  // Addresses of `count` consecutive tokens.
  void run(int64_t first, int count, const void** rows) const {
    int64_t page = first / page_size_;
    int64_t slot = first - page * page_size_;
    for (int some; count > 0; count -= some, rows += some, ++page, slot = 0) {
      const std::byte* row = page_start(page) + slot * token_stride_;
      some = static_cast<int>(std::min<int64_t>(count, page_size_ - slot));
      for (int i = 0; i < some; ++i) rows[i] = row + i * token_stride_;
    }
  }

 private:
  std::byte* page_start(int64_t page) const { return base_ + (table_ == nullptr ? sequence_ + page : table_[page]) * page_stride_; }

  std::byte* base_ = nullptr;
  int64_t page_stride_ = 0;
  int64_t token_stride_ = 0;
  int64_t page_size_ = 1;
  int page_shift_ = -1;
  const int32_t* table_ = nullptr;
  int64_t sequence_ = 0;
};

// Throws unless layers, sequences, heads and head dimension can be.
void check_cache_shape(const lpx_cache* cache);

// A cache whose every row has been checked to lie inside its buffer.
class Cache {
 public:
  explicit Cache(const lpx_cache* cache);

  const lpx_cache& desc() const { return *desc_; }
  const lpx_cache_layer& layer(int index) const { return desc_->layer[index]; }
  const Segments& segments() const { return segments_; }
  int head_dim() const { return desc_->head_dim; }
  lpx_dtype dtype() const { return desc_->dtype; }
  int64_t row_bytes() const { return row_bytes_; }
  int32_t length(int64_t segment) const { return lengths_[static_cast<size_t>(segment)]; }
  const std::vector<int32_t>& lengths() const { return lengths_; }
  int64_t offset(int64_t segment) const { return offsets_[static_cast<size_t>(segment)]; }
  const std::vector<int64_t>& offsets() const { return offsets_; }
  int64_t entries() const { return offsets_.back(); }

  Rows keys(Segment s) const { return Rows(layer(s.layer).key, layer(s.layer), s.sequence, s.head); }
  Rows values(Segment s) const { return Rows(layer(s.layer).value, layer(s.layer), s.sequence, s.head); }
  Rows value_norms(Segment s) const { return Rows(layer(s.layer).value_norm, layer(s.layer), s.sequence, s.head); }
  bool has_positions(int index) const { return layer(index).position.data != nullptr; }
  bool has_value_norms(int index) const { return layer(index).value_norm.data != nullptr; }
  int32_t position(Segment s, int64_t token) const;
  // The position that the next token of this segment would have.
  int32_t context(Segment s) const;

 private:
  void check_layer(int index);
  void check_plane(const lpx_plane& plane, int layer, const char* name, int64_t row_bytes);

  const lpx_cache* desc_;
  Segments segments_;
  int64_t row_bytes_ = 0;
  std::vector<int32_t> lengths_;
  std::vector<int64_t> offsets_;
};

// The bytes from the first element of a tensor to the end of its last row: the sum of last index * stride, and the row.
// INT64_MAX where that does not fit: callers compare it with the size of a buffer.
struct Extent {
  int64_t last;
  int64_t stride;
};
int64_t span_bytes(std::initializer_list<Extent> extents, int64_t row_bytes);

// True where [a, a + a_bytes) and [b, b + b_bytes) share a byte.
bool overlaps(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes);

}  // namespace laprox
