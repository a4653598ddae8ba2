#include <bit>
#include <cinttypes>

#include "core/geometry.hpp"
#include "cuda/kernels/plan.cuh"
#include "cuda/launch/views.hpp"

namespace laprox::cuda {
namespace {

constexpr int64_t kAlignment = 16;  // of rows: they travel 16 bytes at a time

PlaneView plane_view(const lpx_plane& plane) { return {static_cast<char*>(plane.data), plane.page_stride, plane.token_stride, plane.head_stride}; }

void check_plane(const lpx_cache& cache, const lpx_plane& plane, int index, const char* name, int64_t row_bytes, int64_t alignment) {
  if (plane.page_stride < 0 || plane.token_stride < 0 || plane.head_stride < 0 || plane.bytes < 0)
    fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].%s has a negative stride or size", index, name);
  if (cache.max_length > 0 && plane.data == nullptr) fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].%s.data is NULL", index, name);
  if (reinterpret_cast<uintptr_t>(plane.data) % static_cast<uintptr_t>(alignment) != 0)
    fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].%s.data is %p; expected a multiple of %" PRId64 " bytes", index, name, plane.data, alignment);
  if (plane.page_stride % alignment != 0 || plane.token_stride % alignment != 0 || plane.head_stride % alignment != 0)
    fail(LPX_INVALID_ARGUMENT,
         "cache->layer[%d].%s: page, token and head strides are %" PRId64 ", %" PRId64 " and %" PRId64 "; expected multiples of %" PRId64 " bytes",
         index, name, plane.page_stride, plane.token_stride, plane.head_stride, alignment);
  // Page 0 must hold a row of every head; what the table names beyond it is looked at on the device.
  const int64_t needed = span_bytes({{cache.kv_heads - 1, plane.head_stride}}, row_bytes);
  if (cache.max_length > 0 && needed > plane.bytes)
    fail(LPX_OUT_OF_BOUNDS, "cache->layer[%d].%s: one row of %d heads takes %" PRId64 " bytes with these strides; the buffer has %" PRId64, index,
         name, cache.kv_heads, needed, plane.bytes);
}

}  // namespace

void check_cache(const lpx_cache* cache) {
  check_cache_shape(cache);
  if (cache->max_length < 0) fail(LPX_INVALID_ARGUMENT, "cache->max_length is %d; expected an upper bound of every length", cache->max_length);
  if (int64_t{cache->layers} * cache->sequences * cache->kv_heads > INT32_MAX)
    fail(LPX_UNSUPPORTED, "%d layers, %d sequences and %d KV heads are more segments than a call takes", cache->layers, cache->sequences,
         cache->kv_heads);
  const int64_t row_bytes = static_cast<int64_t>(element_size(cache->dtype)) * cache->head_dim;
  for (int i = 0; i < cache->layers; ++i) {
    const lpx_cache_layer& layer = cache->layer[i];
    if (layer.lengths == nullptr) fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].lengths is NULL", i);
    if (layer.page_size < 1) fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].page_size is %d; expected 1 or more", i, layer.page_size);
    if (layer.pages_per_row < 1 || (layer.page_table == nullptr && layer.pages_per_row != 1))
      fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].pages_per_row is %d; expected %s", i, layer.pages_per_row,
           layer.page_table == nullptr ? "1 without a page table" : "1 or more");
    check_plane(*cache, layer.key, i, "key", row_bytes, kAlignment);
    check_plane(*cache, layer.value, i, "value", row_bytes, kAlignment);
    if (layer.position.data != nullptr) {
      check_plane(*cache, layer.position, i, "position", 4, 4);
      if (cache->context_lengths == nullptr)
        fail(LPX_INVALID_ARGUMENT, "cache->context_lengths is NULL, but layer %d has positions: say how many tokens each sequence has read", i);
    }
    if (layer.value_norm.data != nullptr) check_plane(*cache, layer.value_norm, i, "value_norm", 4, 4);
    if ((layer.position.data != nullptr) != (cache->layer[0].position.data != nullptr))
      fail(LPX_INVALID_ARGUMENT, "layer %d has %s position plane and layer 0 has %s: all layers need one, or none", i,
           layer.position.data != nullptr ? "a" : "no", cache->layer[0].position.data != nullptr ? "one" : "none");
  }
}

void check_alignment(const lpx_window& window, int layers) {
  for (int i = 0; i < layers; ++i) {
    const lpx_window_layer& layer = window.layer[i];
    if (reinterpret_cast<uintptr_t>(layer.queries) % kAlignment != 0 || layer.sequence_stride % kAlignment != 0 ||
        layer.head_stride % kAlignment != 0 || layer.row_stride % kAlignment != 0)
      fail(LPX_INVALID_ARGUMENT,
           "window->layer[%d].queries: %p with strides %" PRId64 ", %" PRId64 " and %" PRId64 "; expected multiples of %" PRId64 " bytes", i,
           layer.queries, layer.sequence_stride, layer.head_stride, layer.row_stride, kAlignment);
  }
}

void spread_contexts(const Launch& launch, const int32_t* context_lengths, int sequences, int kv_heads, int64_t segments, int32_t* contexts) {
  constexpr int kThreads = 256;
  launch.run("contexts", spread_contexts_kernel, static_cast<unsigned>(ceil_div(segments, kThreads)), kThreads, 0, context_lengths, sequences,
             kv_heads, static_cast<int>(segments), contexts);
}

Views::Views(Arena& arena, const Inputs& inputs, int64_t stride) : inputs_(inputs) {
  const lpx_cache& cache = inputs.cache;
  geometry_.layers = cache.layers;
  geometry_.sequences = cache.sequences;
  geometry_.kv_heads = cache.kv_heads;
  geometry_.group = inputs.model == nullptr ? 1 : inputs.model->shape().group;
  geometry_.head_dim = cache.head_dim;
  geometry_.rows = inputs.window == nullptr ? 0 : inputs.window->rows;
  geometry_.max_length = cache.max_length;
  geometry_.segments = cache.layers * cache.sequences * cache.kv_heads;
  geometry_.stride = stride;
  geometry_.lse_scale = inputs.window != nullptr && inputs.window->lse_base == LPX_NATURAL ? 1.44269504088896340736f : 1.0f;
  geometry_.layer = views_ = arena.take<LayerView>(cache.layers);
  geometry_.lengths = lengths_ = arena.take<int32_t>(geometry_.segments);
  geometry_.contexts = contexts_ = arena.take<int32_t>(geometry_.segments);
  own_status_ = arena.take<int32_t>(1);
  geometry_.status = inputs.status != nullptr ? inputs.status : own_status_;
  geometry_.arrivals = arena.take<uint32_t>(kArrivals);
}

LayerView Views::view(int index) const {
  const lpx_cache_layer& from = inputs_.cache.layer[index];
  LayerView to{};
  to.key = plane_view(from.key);
  to.value = plane_view(from.value);
  to.position = plane_view(from.position);
  to.value_norm = plane_view(from.value_norm);
  to.page_table = from.page_table;
  to.table_sequence_stride = from.table_sequence_stride;
  to.table_head_stride = from.table_head_stride;
  to.page_size = from.page_size;
  const auto size = static_cast<uint32_t>(from.page_size);
  to.page_shift = std::has_single_bit(size) ? std::countr_zero(size) : -1;
  to.weight = inputs_.rule == nullptr || inputs_.rule->layer_weights == nullptr ? 1.0f : inputs_.rule->layer_weights[index];
  if (inputs_.window != nullptr) {
    const lpx_window_layer& window = inputs_.window->layer[index];
    to.queries = static_cast<const char*>(window.queries);
    to.query_sequence_stride = window.sequence_stride;
    to.query_head_stride = window.head_stride;
    to.query_row_stride = window.row_stride;
    to.lse = reinterpret_cast<const char*>(window.lse);
    to.lse_sequence_stride = window.lse_sequence_stride;
    to.lse_head_stride = window.lse_head_stride;
    to.lse_row_stride = window.lse_row_stride;
  }
  if (inputs_.model != nullptr) {
    const Layer& layer = inputs_.model->shape().layers[static_cast<size_t>(index)];
    to.scale = layer.scale;
    to.soft_cap = layer.soft_cap;
    to.sliding_window = layer.sliding_window;
    to.sink_logits = inputs_.model->sink_logits(index);
  }
  return to;
}

LayerLimits Views::limits(int index) const {
  const lpx_cache_layer& from = inputs_.cache.layer[index];
  return {from.lengths,     from.length_sequence_stride, from.length_head_stride, from.pages_per_row, from.key.bytes,
          from.value.bytes, from.position.bytes,         from.value_norm.bytes};
}

void Views::upload(const Launch& launch) const {
  if (inputs_.status == nullptr) check(cudaMemsetAsync(own_status_, 0, sizeof *own_status_, launch.stream), "plan");  // LPX_OK
  const int64_t row_bytes = static_cast<int64_t>(element_size(inputs_.cache.dtype)) * inputs_.cache.head_dim;
  const int each = geometry_.sequences * geometry_.kv_heads;
  for (int first = 0; first < geometry_.layers; first += kPlanLayers) {
    const int count = std::min(kPlanLayers, geometry_.layers - first);
    LayerBatch batch{};
    for (int i = 0; i < count; ++i) {
      batch.views[i] = view(first + i);
      batch.limits[i] = limits(first + i);
    }
    launch.run("plan", plan_segments, static_cast<unsigned>(count * each), kPlanThreads, 0, batch, geometry_, first, inputs_.cache.context_lengths,
               row_bytes, views_, lengths_, contexts_);
  }
}

void Views::write_positions(const Launch& launch, int32_t* positions) const {
  launch.run("positions", write_positions_kernel, geometry_.segments, kPlanThreads, 0, geometry_, positions);
}

}  // namespace laprox::cuda
