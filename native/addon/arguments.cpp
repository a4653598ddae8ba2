#include "addon/arguments.hpp"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <map>

namespace laprox::addon {
namespace {

constexpr double kMaxInteger = 9007199254740991;  // 2^53 - 1

template <typename T>
constexpr napi_typedarray_type kTypeOf = napi_uint8_array;
template <>
constexpr napi_typedarray_type kTypeOf<float> = napi_float32_array;
template <>
constexpr napi_typedarray_type kTypeOf<int32_t> = napi_int32_array;
template <>
constexpr napi_typedarray_type kTypeOf<double> = napi_float64_array;

napi_typedarray_type type_of(lpx_dtype dtype) { return dtype == LPX_F32 ? napi_float32_array : napi_uint16_array; }

// Throws unless [offset, offset + bytes) lies inside a buffer of this type.
std::byte* inside(const Buffer& buffer, napi_typedarray_type type, int64_t offset, int64_t bytes) {
  if (offset < 0 || bytes < 0 || offset > buffer.bytes || bytes > buffer.bytes - offset) {
    if (buffer.bytes == 0) fail("DETACHED", "a buffer of the call has no memory: it was detached (transferred elsewhere)");
    fail("OUT_OF_BOUNDS", "%" PRId64 " bytes from byte %" PRId64 " on leave a buffer of %" PRId64 " bytes", bytes, offset, buffer.bytes);
  }
  if (bytes > 0 && buffer.type != type) fail("INVALID_ARGUMENT", "a typed array is of type %d of Node-API; expected %d", buffer.type, type);
  return buffer.data + offset;
}

// 1 + sum of (size - 1) * stride over two dimensions, plus (run - 1): elements from the first to the last one.
int64_t extent(int64_t size0, int64_t stride0, int64_t size1, int64_t stride1, int64_t run) {
  int64_t first, second, sum;
  if (stride0 < 0 || stride1 < 0 || run < 0 || __builtin_mul_overflow(size0 - 1, stride0, &first) ||
      __builtin_mul_overflow(size1 - 1, stride1, &second) || __builtin_add_overflow(first, second, &sum) || __builtin_add_overflow(sum, run, &sum))
    fail("OUT_OF_BOUNDS", "strides %" PRId64 " and %" PRId64 " leave every buffer", stride0, stride1);
  return sum;
}

int32_t positive(int32_t value, const char* name) {
  if (value < 1) fail("INVALID_ARGUMENT", "%s is %d; expected 1 or more", name, value);
  return value;
}

Bytes read_memory(Section& section, napi_typedarray_type type) {
  const Section::Place place = section.place();
  const int64_t bytes = section.integer();
  if (place.on_device) return {place.address<std::byte>(), bytes};
  if (place.buffer == nullptr) return {};
  if (section.on_device()) fail("INVALID_ARGUMENT", "a tensor of a call on a GPU is in host memory");
  return {inside(*place.buffer, type, place.offset, bytes), bytes};
}

lpx_plane read_plane(Section& section, napi_typedarray_type type) {
  const Bytes memory = read_memory(section, type);
  lpx_plane plane{};
  plane.data = memory.data;
  plane.bytes = memory.bytes;
  plane.page_stride = section.integer();
  plane.token_stride = section.integer();
  plane.head_stride = section.integer();
  return plane;
}

}  // namespace

Section::Section(Napi::Value numbers, const Buffers& buffers, size_t& next, bool on_device) : buffers_(buffers), first_(next), on_device_(on_device) {
  const Buffer buffer = buffer_of(numbers.Env(), numbers);
  if (buffer.type != napi_float64_array) fail("INVALID_ARGUMENT", "a section's numbers are no Float64Array");
  at_ = reinterpret_cast<const double*>(buffer.data);
  end_ = at_ + buffer.bytes / 8;
  const int64_t count = integer();
  if (count < 0 || static_cast<size_t>(count) > buffers.count() - first_)
    fail("INVALID_ARGUMENT", "a section has %" PRId64 " buffers; the call has %zu left", count, buffers.count() - first_);
  count_ = static_cast<size_t>(count);
  next += count_;
}

double Section::real() {
  if (at_ == end_) fail("INVALID_ARGUMENT", "a section's numbers end early: is laprox.node of another version than lib?");
  return *at_++;
}

int64_t Section::integer() {
  const double value = real();
  if (!(std::fabs(value) <= kMaxInteger) || std::trunc(value) != value) fail("INVALID_ARGUMENT", "%g is no integer below 2^53", value);
  return static_cast<int64_t>(value);
}

int32_t Section::int32() {
  const int64_t value = integer();
  if (value < INT32_MIN || value > INT32_MAX) fail("INVALID_ARGUMENT", "%" PRId64 " is no 32-bit integer", value);
  return static_cast<int32_t>(value);
}

const Buffer* Section::buffer() {
  const int64_t index = integer();
  if (index == -1) return nullptr;
  if (index < 0 || static_cast<size_t>(index) >= count_) fail("INVALID_ARGUMENT", "buffer %" PRId64 " of a section that has %zu", index, count_);
  return &buffers_[first_ + static_cast<size_t>(index)];
}

Section::Place Section::place() {
  const double* record = at_;
  if (integer() == kOnDevice) {
    if (!on_device_) fail("INVALID_ARGUMENT", "a tensor of a call on the CPU is in a GPU's memory");
    return {nullptr, true, integer()};
  }
  at_ = record;
  const Buffer* found = buffer();
  return {found, false, integer()};
}

template <typename T>
T* elements(const Buffer& buffer, int64_t offset, int64_t count) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  if (offset > INT64_MAX / kSize || count > INT64_MAX / kSize) fail("OUT_OF_BOUNDS", "%" PRId64 " elements leave every buffer", count);
  return reinterpret_cast<T*>(inside(buffer, kTypeOf<T>, offset * kSize, count * kSize));
}

template float* elements<float>(const Buffer&, int64_t, int64_t);
template int32_t* elements<int32_t>(const Buffer&, int64_t, int64_t);
template double* elements<double>(const Buffer&, int64_t, int64_t);

ModelArguments::ModelArguments(Section section) {
  desc.size = sizeof desc;
  desc.layers = positive(section.int32(), "layers");
  desc.query_heads = positive(section.int32(), "queryHeads");
  desc.kv_heads = positive(section.int32(), "kvHeads");
  desc.head_dim = positive(section.int32(), "headDim");
  desc.model_dim = section.int32();
  desc.projection_dtype = section.choice<lpx_dtype>();
  layers_.reserve(static_cast<size_t>(desc.layers));
  sink_logits_.resize(static_cast<size_t>(desc.layers) * static_cast<size_t>(desc.query_heads));
  for (int32_t i = 0; i < desc.layers; ++i) {
    lpx_layer layer{};
    const Section::Place place = section.place();
    layer.projection_bytes = section.integer();
    if (place.on_device) layer.projection = place.address<void>();
    if (place.buffer != nullptr) layer.projection = inside(*place.buffer, type_of(desc.projection_dtype), place.offset, layer.projection_bytes);
    const bool upload = section.on_device() && place.buffer != nullptr;
    layer.projection_row_stride = section.integer();
    layer.projection_column_stride = section.integer();
    layer.scale = static_cast<float>(section.real());
    layer.soft_cap = static_cast<float>(section.real());
    layer.sliding_window = section.int32();
    const Buffer* sinks = section.buffer();
    if (sinks != nullptr) {
      float* copy = sink_logits_.data() + int64_t{i} * desc.query_heads;
      std::copy_n(elements<float>(*sinks, 0, desc.query_heads), desc.query_heads, copy);
      layer.sink_logits = copy;
    }
    layers_.push_back(layer);
    if (upload) on_host.push_back(&layers_.back());  // there is room for all of them: none moves
  }
  desc.layer = layers_.data();
}

int64_t ModelArguments::factor_bytes() const {
  const int64_t features = int64_t{desc.query_heads} / desc.kv_heads * desc.head_dim;
  int64_t bytes = 0;
  for (const lpx_layer& layer : layers_)
    if (layer.projection != nullptr) bytes += desc.kv_heads * features * features * 4;
  return bytes;
}

void read_planes(Section& section, lpx_dtype dtype, lpx_cache_layer& layer) {
  layer.key = read_plane(section, type_of(dtype));
  layer.value = read_plane(section, type_of(dtype));
  layer.position = read_plane(section, napi_int32_array);
  layer.value_norm = read_plane(section, napi_float32_array);
}

CacheArguments::CacheArguments(Section section) {
  desc_.size = sizeof desc_;
  desc_.dtype = section.choice<lpx_dtype>();
  desc_.layers = positive(section.int32(), "layers");
  desc_.sequences = positive(section.int32(), "sequences");
  desc_.kv_heads = positive(section.int32(), "kvHeads");
  desc_.head_dim = positive(section.int32(), "headDim");
  const Buffer* contexts = section.buffer();
  if (contexts != nullptr) desc_.context_lengths = elements<int32_t>(*contexts, 0, desc_.sequences);
  contexts_ = {contexts, 0};
  layers_.reserve(static_cast<size_t>(desc_.layers));
  for (int32_t i = 0; i < desc_.layers; ++i) {
    lpx_cache_layer layer{};
    read_planes(section, desc_.dtype, layer);
    layer.page_size = section.int32();
    layer.pages_per_row = section.int32();
    const Section::Place table = section.place();
    layer.table_sequence_stride = section.integer();
    layer.table_head_stride = section.integer();
    table_places_.push_back({table.buffer, table.offset});
    if (table.on_device) layer.page_table = table.address<int32_t>();
    if (table.buffer != nullptr)
      layer.page_table =
          elements<int32_t>(*table.buffer, table.offset,
                            extent(desc_.sequences, layer.table_sequence_stride, desc_.kv_heads, layer.table_head_stride, layer.pages_per_row));
    const Buffer* lengths = section.buffer();
    if (lengths == nullptr) fail("INVALID_ARGUMENT", "layer %d of a cache has no lengths", i);
    const int64_t lengths_offset = section.integer();
    layer.length_sequence_stride = section.integer();
    layer.length_head_stride = section.integer();
    layer.lengths = elements<int32_t>(*lengths, lengths_offset,
                                      extent(desc_.sequences, layer.length_sequence_stride, desc_.kv_heads, layer.length_head_stride, 1));
    length_places_.push_back({lengths, lengths_offset});
    layers_.push_back(layer);
  }
  desc_.layer = layers_.data();
}

void CacheArguments::put_on(Exchange& exchange) {
  const std::vector<int32_t> all = lengths();
  desc_.max_length = all.empty() ? 0 : *std::max_element(all.begin(), all.end());
  if (contexts_.buffer != nullptr) exchange.input(&desc_.context_lengths, *contexts_.buffer, contexts_.offset);
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (table_places_[i].buffer != nullptr) exchange.input(&layers_[i].page_table, *table_places_[i].buffer, table_places_[i].offset);
    exchange.input(&layers_[i].lengths, *length_places_[i].buffer, length_places_[i].offset);
  }
}

bool CacheArguments::has_positions() const {
  return std::any_of(layers_.begin(), layers_.end(), [](const lpx_cache_layer& layer) { return layer.position.data != nullptr; });
}

bool CacheArguments::has_value_norms() const {
  return std::all_of(layers_.begin(), layers_.end(), [](const lpx_cache_layer& layer) { return layer.value_norm.data != nullptr; });
}

void CacheArguments::copy_tables() {
  std::map<const int32_t*, size_t> copies;
  for (lpx_cache_layer& layer : layers_) {
    if (layer.page_table == nullptr) continue;
    const auto count =
        static_cast<size_t>(extent(desc_.sequences, layer.table_sequence_stride, desc_.kv_heads, layer.table_head_stride, layer.pages_per_row));
    const auto found = copies.find(layer.page_table);
    if (found == copies.end() || tables_[found->second].size() < count) {
      copies[layer.page_table] = tables_.size();
      tables_.emplace_back(layer.page_table, layer.page_table + count);
    }
    layer.page_table = tables_[copies[layer.page_table]].data();
  }
}

std::vector<int32_t> CacheArguments::lengths() const {
  std::vector<int32_t> result;
  result.reserve(static_cast<size_t>(segments()));
  for (const lpx_cache_layer& layer : layers_)
    for (int64_t sequence = 0; sequence < desc_.sequences; ++sequence)
      for (int64_t head = 0; head < desc_.kv_heads; ++head)
        result.push_back(layer.lengths[sequence * layer.length_sequence_stride + head * layer.length_head_stride]);
  return result;
}

WindowArguments::WindowArguments(Section section) {
  const int32_t layers = section.int32();
  if (layers == 0) return;
  desc_.size = sizeof desc_;
  desc_.dtype = section.choice<lpx_dtype>();
  desc_.rows = section.int32();
  desc_.lse_base = section.choice<lpx_lse_base>();
  layers_.reserve(static_cast<size_t>(positive(layers, "layers")));
  for (int32_t i = 0; i < layers; ++i) {
    lpx_window_layer layer{};
    const Bytes queries = read_memory(section, type_of(desc_.dtype));
    layer.queries = queries.data;
    layer.queries_bytes = queries.bytes;
    layer.sequence_stride = section.integer();
    layer.head_stride = section.integer();
    layer.row_stride = section.integer();
    const Bytes lse = read_memory(section, napi_float32_array);
    layer.lse = reinterpret_cast<const float*>(lse.data);
    layer.lse_bytes = lse.bytes;
    layer.lse_sequence_stride = section.integer();
    layer.lse_head_stride = section.integer();
    layer.lse_row_stride = section.integer();
    layers_.push_back(layer);
  }
  desc_.layer = layers_.data();
}

ScoreRuleArguments::ScoreRuleArguments(Section section) {
  desc_.size = sizeof desc_;
  desc_.statistic = section.choice<lpx_statistic>();
  desc_.attention = section.choice<lpx_attention_statistic>();
  desc_.value = section.choice<lpx_value_statistic>();
  desc_.aggregation = section.choice<lpx_aggregation>();
  desc_.sharing = section.choice<lpx_sharing>();
  desc_.seed = static_cast<uint64_t>(section.integer());
  const int32_t weights = section.int32();
  for (int32_t i = 0; i < weights; ++i) weights_.push_back(static_cast<float>(section.real()));
  desc_.layer_weights = weights_.empty() ? nullptr : weights_.data();
}

const lpx_score_rule& ScoreRuleArguments::desc(int32_t layers) const {
  if (!weights_.empty() && weights_.size() != static_cast<size_t>(layers))
    fail("INVALID_ARGUMENT", "layerWeights has %zu numbers; expected one a layer, %d", weights_.size(), layers);
  return desc_;
}

SelectRuleArguments::SelectRuleArguments(Section section) {
  desc.size = sizeof desc;
  desc.pooling = section.choice<lpx_pooling>();
  desc.pooling_width = section.int32();
  desc.scope = section.choice<lpx_scope>();
  desc.budget = section.choice<lpx_budget>();
  desc.ratio = section.real();
  desc.amount = section.integer();
  desc.floor = section.real();
  desc.pyramid_beta = section.real();
  desc.sinks = section.int32();
  desc.recent = section.int32();
  desc.non_finite = section.choice<lpx_non_finite>();
  desc.pinned_count = section.int32();
  for (int32_t i = 0; i < desc.pinned_count; ++i) {
    const int32_t begin = section.int32();
    pinned_.push_back({begin, section.int32()});
  }
  desc.pinned = pinned_.empty() ? nullptr : pinned_.data();
}

SelectionArguments::SelectionArguments(Section section, int64_t segments) : segments_(segments) {
  const Buffer* tokens = section.buffer();
  const Buffer* offsets = section.buffer();
  if (tokens == nullptr || offsets == nullptr) fail("INVALID_ARGUMENT", "a selection has no tokens or no offsets");
  given_count_ = tokens->bytes / 4;
  given_tokens_ = elements<int32_t>(*tokens, 0, given_count_);
  given_offsets_ = elements<double>(*offsets, 0, segments + 1);
}

void SelectionArguments::copy() {
  tokens_.assign(given_tokens_, given_tokens_ + given_count_);
  offsets_.reserve(static_cast<size_t>(segments_) + 1);
  for (int64_t i = 0; i <= segments_; ++i) {
    const double offset = given_offsets_[i];
    if (!(offset >= 0 && offset <= static_cast<double>(given_count_)))
      fail("OUT_OF_BOUNDS", "selection.offsets[%lld] is %g; expected 0 to %lld", static_cast<long long>(i), offset,
           static_cast<long long>(given_count_));
    offsets_.push_back(static_cast<int64_t>(offset));
  }
  desc.size = sizeof desc;
  desc.tokens = tokens_.data();
  desc.capacity = given_count_;
  desc.offsets = offsets_.data();
}

TargetArguments::TargetArguments(Section section, lpx_dtype dtype) {
  desc.size = sizeof desc;
  desc.target = section.choice<lpx_target>();
  desc.table_width = section.int32();
  if (desc.table_width < 0) fail("INVALID_ARGUMENT", "the page table's width is %d; expected 0 or more", desc.table_width);
  desc.layers = section.int32();
  for (int32_t i = 0; i < desc.layers; ++i) {
    lpx_cache_layer layer{};
    read_planes(section, dtype, layer);
    layer.page_size = section.int32();
    layer.pages_per_row = 1;
    layers.push_back(layer);
  }
  desc.layer = layers.empty() ? nullptr : layers.data();
  desc.free_list_count = section.int32();
  for (int32_t i = 0; i < desc.free_list_count; ++i) {
    const Buffer* pages = section.buffer();
    if (pages == nullptr) fail("INVALID_ARGUMENT", "free list %d has no buffer", i);
    free_list_buffers.push_back(pages);
    free_lists.push_back({elements<int32_t>(*pages, 0, pages->bytes / 4), pages->bytes / 4});
  }
  desc.free_lists = free_lists.data();
  if (section.on_device()) desc.freed_capacity = section.integer();
}

}  // namespace laprox::addon
