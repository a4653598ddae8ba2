#include "core/model.hpp"

#include <cinttypes>
#include <cmath>

#include "core/status.hpp"

namespace laprox {

ModelShape::ModelShape(const lpx_model_desc* desc) {
  check_struct(desc, "desc");
  if (desc->layers < 1) fail(LPX_INVALID_ARGUMENT, "desc->layers is %d; expected 1 or more", desc->layers);
  if (desc->kv_heads < 1) fail(LPX_INVALID_ARGUMENT, "desc->kv_heads is %d; expected 1 or more", desc->kv_heads);
  if (desc->query_heads < 1 || desc->query_heads % desc->kv_heads != 0)
    fail(LPX_INVALID_ARGUMENT, "desc->query_heads is %d; expected a multiple of kv_heads, which is %d", desc->query_heads, desc->kv_heads);
  if (desc->query_heads / desc->kv_heads > kMaxGroup)
    fail(LPX_INVALID_ARGUMENT, "%d query heads share one KV head; at most %d may", desc->query_heads / desc->kv_heads, kMaxGroup);
  if (desc->head_dim < 8 || desc->head_dim > kMaxHeadDim || desc->head_dim % 8 != 0)
    fail(LPX_INVALID_ARGUMENT, "desc->head_dim is %d; expected a multiple of 8 from 8 to %d", desc->head_dim, kMaxHeadDim);
  if (desc->layer == nullptr) fail(LPX_INVALID_ARGUMENT, "desc->layer is NULL; expected %d layers", desc->layers);
  check_dtype(desc->projection_dtype, "desc->projection_dtype");
  query_heads = desc->query_heads;
  kv_heads = desc->kv_heads;
  group = query_heads / kv_heads;
  head_dim = desc->head_dim;
  model_dim = desc->model_dim;
  projection_dtype = desc->projection_dtype;
  layers.resize(static_cast<size_t>(desc->layers));
  for (int i = 0; i < desc->layers; ++i) {
    const lpx_layer& from = desc->layer[i];
    Layer& to = layers[static_cast<size_t>(i)];
    if (!std::isfinite(from.scale) || from.scale < 0)
      fail(LPX_INVALID_ARGUMENT, "desc->layer[%d].scale is %g; expected a positive number, or 0 for 1/sqrt(head_dim)", i, from.scale);
    if (!std::isfinite(from.soft_cap) || from.soft_cap < 0)
      fail(LPX_INVALID_ARGUMENT, "desc->layer[%d].soft_cap is %g; expected a positive number, or 0 for none", i, from.soft_cap);
    if (from.sliding_window < 0)
      fail(LPX_INVALID_ARGUMENT, "desc->layer[%d].sliding_window is %d; expected 1 or more, or 0 for none", i, from.sliding_window);
    to.scale = from.scale == 0 ? static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim))) : from.scale;
    to.soft_cap = from.soft_cap;
    to.sliding_window = from.sliding_window;
    if (from.sink_logits != nullptr) {
      to.sink_logits.assign(from.sink_logits, from.sink_logits + query_heads);
      for (int h = 0; h < query_heads; ++h)
        if (!std::isfinite(to.sink_logits[static_cast<size_t>(h)]))
          fail(LPX_NON_FINITE, "desc->layer[%d].sink_logits[%d] is %g; expected a finite number", i, h, to.sink_logits[static_cast<size_t>(h)]);
    }
    if (from.projection == nullptr) continue;
    if (model_dim < 1)
      fail(LPX_INVALID_ARGUMENT, "desc->model_dim is %d, but layer %d has a projection; expected its number of columns", model_dim, i);
    const auto element = static_cast<int64_t>(element_size(projection_dtype));
    const int64_t needed = span_bytes(
        {{int64_t{query_heads} * head_dim - 1, from.projection_row_stride}, {int64_t{model_dim} - 1, from.projection_column_stride}}, element);
    if (from.projection_row_stride < element || from.projection_column_stride < element || from.projection_row_stride % element != 0 ||
        from.projection_column_stride % element != 0 || reinterpret_cast<uintptr_t>(from.projection) % static_cast<uintptr_t>(element) != 0)
      fail(LPX_INVALID_ARGUMENT, "desc->layer[%d]: projection strides are %" PRId64 " and %" PRId64 " bytes; expected positive multiples of %" PRId64,
           i, from.projection_row_stride, from.projection_column_stride, element);
    if (needed > from.projection_bytes)
      fail(LPX_OUT_OF_BOUNDS, "desc->layer[%d]: the projection [%d x %d] takes %" PRId64 " bytes with these strides; its buffer has %" PRId64, i,
           query_heads * head_dim, model_dim, needed, from.projection_bytes);
    to.projection = {static_cast<const std::byte*>(from.projection), from.projection_row_stride, from.projection_column_stride};
  }
}

void ModelShape::check(const lpx_cache& cache) const {
  if (cache.layers != static_cast<int>(layers.size()))
    fail(LPX_INVALID_ARGUMENT, "the cache has %d layers; the model has %zu", cache.layers, layers.size());
  if (cache.kv_heads != kv_heads) fail(LPX_INVALID_ARGUMENT, "the cache has %d KV heads; the model has %d", cache.kv_heads, kv_heads);
  if (cache.head_dim != head_dim) fail(LPX_INVALID_ARGUMENT, "the cache has head dimension %d; the model has %d", cache.head_dim, head_dim);
}

Window::Window(const lpx_window* window, const ModelShape& model, const lpx_cache& cache, int32_t ahead)
    : desc_(window), group_(model.group), ahead_(ahead) {
  check_struct(window, "window");
  check_dtype(window->dtype, "window->dtype");
  if (window->rows < 1 || window->rows > kMaxWindow)
    fail(LPX_INVALID_ARGUMENT, "window->rows is %d; expected 1 to %d queries", window->rows, kMaxWindow);
  if (window->lse_base != LPX_NATURAL && window->lse_base != LPX_BASE_2)
    fail(LPX_INVALID_ARGUMENT, "window->lse_base is %d; expected LPX_NATURAL or LPX_BASE_2", static_cast<int>(window->lse_base));
  if (window->layer == nullptr) fail(LPX_INVALID_ARGUMENT, "window->layer is NULL; expected %d layers", cache.layers);
  const int64_t sequences = cache.sequences;
  const auto element = static_cast<int64_t>(element_size(window->dtype));
  for (int i = 0; i < cache.layers; ++i) {
    const lpx_window_layer& layer = window->layer[i];
    if (layer.queries == nullptr) fail(LPX_INVALID_ARGUMENT, "window->layer[%d].queries is NULL", i);
    if (layer.sequence_stride < 0 || layer.head_stride < 0 || layer.row_stride < 0 || layer.sequence_stride % element != 0 ||
        layer.head_stride % element != 0 || layer.row_stride % element != 0 ||
        reinterpret_cast<uintptr_t>(layer.queries) % static_cast<uintptr_t>(element) != 0)
      fail(LPX_INVALID_ARGUMENT, "window->layer[%d].queries: address and strides must be non-negative multiples of %" PRId64 " bytes", i, element);
    const int64_t needed =
        span_bytes({{sequences - 1, layer.sequence_stride}, {model.query_heads - 1, layer.head_stride}, {window->rows - 1, layer.row_stride}},
                   element * model.head_dim);
    if (needed > layer.queries_bytes)
      fail(LPX_OUT_OF_BOUNDS,
           "window->layer[%d].queries: [%" PRId64 ", %d, %d, %d] takes %" PRId64 " bytes with these strides; the buffer has %" PRId64, i, sequences,
           model.query_heads, window->rows, model.head_dim, needed, layer.queries_bytes);
    if (layer.lse == nullptr) continue;
    if (layer.lse_sequence_stride < 0 || layer.lse_head_stride < 0 || layer.lse_row_stride < 0 || layer.lse_sequence_stride % 4 != 0 ||
        layer.lse_head_stride % 4 != 0 || layer.lse_row_stride % 4 != 0 || reinterpret_cast<uintptr_t>(layer.lse) % 4 != 0)
      fail(LPX_INVALID_ARGUMENT, "window->layer[%d].lse: address and strides must be non-negative multiples of 4 bytes", i);
    const int64_t lse_needed = span_bytes(
        {{sequences - 1, layer.lse_sequence_stride}, {model.query_heads - 1, layer.lse_head_stride}, {window->rows - 1, layer.lse_row_stride}}, 4);
    if (lse_needed > layer.lse_bytes)
      fail(LPX_OUT_OF_BOUNDS, "window->layer[%d].lse: [%" PRId64 ", %d, %d] takes %" PRId64 " bytes with these strides; the buffer has %" PRId64, i,
           sequences, model.query_heads, window->rows, lse_needed, layer.lse_bytes);
  }
}

const std::byte* Window::query(Segment s, int group_head, int row) const {
  const lpx_window_layer& layer = desc_->layer[s.layer];
  const int64_t head = int64_t{s.head} * group_ + group_head;
  return static_cast<const std::byte*>(layer.queries) + s.sequence * layer.sequence_stride + head * layer.head_stride + row * layer.row_stride;
}

double Window::log2_sum(Segment s, int group_head, int row) const {
  const lpx_window_layer& layer = desc_->layer[s.layer];
  const int64_t head = int64_t{s.head} * group_ + group_head;
  const float value = *reinterpret_cast<const float*>(reinterpret_cast<const std::byte*>(layer.lse) + s.sequence * layer.lse_sequence_stride +
                                                      head * layer.lse_head_stride + row * layer.lse_row_stride);
  return desc_->lse_base == LPX_BASE_2 ? value : value * 1.44269504088896340736;
}

}  // namespace laprox
