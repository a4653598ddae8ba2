#include "core/geometry.hpp"

#include <algorithm>
#include <cinttypes>

#include "core/status.hpp"

namespace laprox {

const char* dtype_name(lpx_dtype dtype) {
  switch (dtype) {
    case LPX_F32: return "float32";
    case LPX_F16: return "float16";
    case LPX_BF16: return "bfloat16";
  }
  return "unknown";
}

void check_dtype(lpx_dtype dtype, const char* name) {
  if (dtype != LPX_F32 && dtype != LPX_F16 && dtype != LPX_BF16)
    fail(LPX_INVALID_ARGUMENT, "%s is %d; expected LPX_F32, LPX_F16 or LPX_BF16", name, static_cast<int>(dtype));
}

int64_t span_bytes(std::initializer_list<Extent> extents, int64_t row_bytes) {
  int64_t total = row_bytes;
  for (const Extent extent : extents) {
    int64_t bytes = 0;
    if (__builtin_mul_overflow(extent.last, extent.stride, &bytes) || __builtin_add_overflow(total, bytes, &total)) return INT64_MAX;
  }
  return total;
}

bool overlaps(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  const auto first = reinterpret_cast<uintptr_t>(a);
  const auto second = reinterpret_cast<uintptr_t>(b);
  return first < second + static_cast<uintptr_t>(b_bytes) && second < first + static_cast<uintptr_t>(a_bytes) && a_bytes > 0 && b_bytes > 0;
}

void check_cache_shape(const lpx_cache* cache) {
  check_struct(cache, "cache");
  check_dtype(cache->dtype, "cache->dtype");
  if (cache->layers < 1) fail(LPX_INVALID_ARGUMENT, "cache->layers is %d; expected 1 or more", cache->layers);
  if (cache->sequences < 1) fail(LPX_INVALID_ARGUMENT, "cache->sequences is %d; expected 1 or more", cache->sequences);
  if (cache->kv_heads < 1) fail(LPX_INVALID_ARGUMENT, "cache->kv_heads is %d; expected 1 or more", cache->kv_heads);
  if (cache->head_dim < 8 || cache->head_dim > kMaxHeadDim || cache->head_dim % 8 != 0)
    fail(LPX_INVALID_ARGUMENT, "cache->head_dim is %d; expected a multiple of 8 from 8 to %d", cache->head_dim, kMaxHeadDim);
  if (cache->layer == nullptr) fail(LPX_INVALID_ARGUMENT, "cache->layer is NULL; expected %d layers", cache->layers);
}

Cache::Cache(const lpx_cache* cache) : desc_(cache) {
  check_cache_shape(cache);
  segments_ = {cache->layers, cache->sequences, cache->kv_heads};
  row_bytes_ = static_cast<int64_t>(element_size(cache->dtype)) * cache->head_dim;
  lengths_.resize(static_cast<size_t>(segments_.count()));
  offsets_.assign(static_cast<size_t>(segments_.count()) + 1, 0);
  for (int index = 0; index < cache->layers; ++index) check_layer(index);
  for (int index = 1; index < cache->layers; ++index)
    if (has_positions(index) != has_positions(0))
      fail(LPX_INVALID_ARGUMENT, "layer %d has %s position plane and layer 0 has %s: all layers need one, or none", index,
           has_positions(index) ? "a" : "no", has_positions(0) ? "one" : "none");
  for (size_t i = 0; i < lengths_.size(); ++i) offsets_[i + 1] = offsets_[i] + lengths_[i];
}

void Cache::check_layer(int index) {
  const lpx_cache_layer& layer = desc_->layer[index];
  if (layer.lengths == nullptr) fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].lengths is NULL", index);
  if (layer.page_size < 1) fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].page_size is %d; expected 1 or more", index, layer.page_size);
  if (layer.pages_per_row < 1 || (layer.page_table == nullptr && layer.pages_per_row != 1))
    fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].pages_per_row is %d; expected %s", index, layer.pages_per_row,
         layer.page_table == nullptr ? "1 without a page table" : "1 or more");
  const int64_t capacity = int64_t{layer.page_size} * layer.pages_per_row;
  for (int sequence = 0; sequence < segments_.sequences; ++sequence) {
    for (int head = 0; head < segments_.heads; ++head) {
      const int32_t length = layer.lengths[sequence * layer.length_sequence_stride + head * layer.length_head_stride];
      if (length < 0 || length > capacity)
        fail(LPX_OUT_OF_BOUNDS, "length %d of (layer %d, sequence %d, head %d) is outside 0 to %" PRId64 ", the capacity of its %d page(s) of %d",
             length, index, sequence, head, capacity, layer.pages_per_row, layer.page_size);
      lengths_[static_cast<size_t>(segments_.index({index, sequence, head}))] = length;
    }
  }
  check_plane(layer.key, index, "key", row_bytes_);
  check_plane(layer.value, index, "value", row_bytes_);
  if (layer.position.data != nullptr) {
    check_plane(layer.position, index, "position", 4);
    if (desc_->context_lengths == nullptr)
      fail(LPX_INVALID_ARGUMENT, "cache->context_lengths is NULL, but layer %d has positions: say how many tokens each sequence has read", index);
  }
  if (layer.value_norm.data != nullptr) check_plane(layer.value_norm, index, "value_norm", 4);
}

void Cache::check_plane(const lpx_plane& plane, int index, const char* name, int64_t row_bytes) {
  const lpx_cache_layer& layer = desc_->layer[index];
  const size_t element = row_bytes == 4 ? 4 : element_size(desc_->dtype);
  if (plane.page_stride < 0 || plane.token_stride < 0 || plane.head_stride < 0 || plane.bytes < 0)
    fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].%s has a negative stride or size", index, name);
  if (reinterpret_cast<uintptr_t>(plane.data) % element != 0 || static_cast<size_t>(plane.page_stride) % element != 0 ||
      static_cast<size_t>(plane.token_stride) % element != 0 || static_cast<size_t>(plane.head_stride) % element != 0)
    fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].%s: address and strides must be multiples of %zu bytes", index, name, element);
  for (int sequence = 0; sequence < segments_.sequences; ++sequence) {
    for (int head = 0; head < segments_.heads; ++head) {
      const int64_t length = lengths_[static_cast<size_t>(segments_.index({index, sequence, head}))];
      if (length > 0 && plane.data == nullptr) fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].%s.data is NULL", index, name);
      const int32_t* table =
          layer.page_table == nullptr ? nullptr : layer.page_table + sequence * layer.table_sequence_stride + head * layer.table_head_stride;
      for (int64_t first = 0, page = 0; first < length; first += layer.page_size, ++page) {
        const int64_t id = table == nullptr ? sequence : table[page];
        const int64_t rows = std::min<int64_t>(layer.page_size, length - first);
        if (id < 0 || span_bytes({{id, plane.page_stride}, {rows - 1, plane.token_stride}, {head, plane.head_stride}}, row_bytes) > plane.bytes)
          fail(LPX_OUT_OF_BOUNDS,
               "page %" PRId64 " of (layer %d, sequence %d, head %d, token %" PRId64 ") leaves the %s buffer of %" PRId64
               " bytes (page stride %" PRId64 ", token stride %" PRId64 ", head stride %" PRId64 ")",
               id, index, sequence, head, first, name, plane.bytes, plane.page_stride, plane.token_stride, plane.head_stride);
      }
    }
  }
}

int32_t Cache::position(Segment s, int64_t token) const {
  if (!has_positions(s.layer)) return static_cast<int32_t>(token);
  return *reinterpret_cast<const int32_t*>(Rows(layer(s.layer).position, layer(s.layer), s.sequence, s.head)(token));
}

int32_t Cache::context(Segment s) const { return has_positions(s.layer) ? desc_->context_lengths[s.sequence] : length(segments_.index(s)); }

}  // namespace laprox
