// plan: what the other kernels trust.
//
// Lengths, page ids and positions of a cache are known to the device alone: one block a segment looks at them, and writes the
// segment's length and context, or 0 and a status where a row would leave its buffer. Kernels that walk `lengths` tokens then
// cannot read or write outside of what the caller named. Reads the page tables once: 4 bytes a page.
#pragma once

#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

// What bounds the rows of a layer.
struct LayerLimits {
  const int32_t* lengths;
  int64_t length_sequence_stride;
  int64_t length_head_stride;
  int32_t pages_per_row;
  int64_t key_bytes;
  int64_t value_bytes;
  int64_t position_bytes;
  int64_t value_norm_bytes;
};

inline constexpr int kPlanThreads = 128;
// Layers whose descriptions travel as the parameters of one launch: they are copied when it is enqueued or captured, so no host memory has to stay.
inline constexpr int kPlanLayers = 32;

struct LayerBatch {
  LayerView views[kPlanLayers];
  LayerLimits limits[kPlanLayers];
};

__device__ inline bool page_fits(const PlaneView& plane, int64_t bytes, int64_t page, int64_t rows, int head, int64_t row_bytes) {
  if (plane.data == nullptr) return true;
  return page * plane.page_stride + (rows - 1) * plane.token_stride + head * plane.head_stride + row_bytes <= bytes;
}

// <<<segments of the batch's layers, kPlanThreads>>>: a block a segment, of which the first of a layer puts the layer's description where all kernels
// look for it (`views`), and the first of all sets the arrivals to zero.
__global__ void __launch_bounds__(kPlanThreads)
    plan_segments(const __grid_constant__ LayerBatch batch, const __grid_constant__ Geometry g, int first_layer, const int32_t* context_lengths,
                  int64_t row_bytes, LayerView* views, int32_t* lengths, int32_t* contexts) {
  follow_previous();
  const int segment = first_layer * g.sequences * g.kv_heads + static_cast<int>(blockIdx.x);
  const int sequence = g.sequence_of(segment);
  const int head = g.head_of(segment);
  const int index = g.layer_of(segment) - first_layer;
  const LayerView& layer = batch.views[index];
  const LayerLimits& limit = batch.limits[index];
  static_assert(sizeof(LayerView) % sizeof(uint64_t) == 0 && sizeof(LayerView) / sizeof(uint64_t) <= kPlanThreads, "a word a thread");
  if (sequence == 0 && head == 0 && threadIdx.x < sizeof(LayerView) / sizeof(uint64_t))
    reinterpret_cast<uint64_t*>(views + first_layer + index)[threadIdx.x] = reinterpret_cast<const uint64_t*>(&layer)[threadIdx.x];
  if (segment == 0 && threadIdx.x < kArrivals) g.arrivals[threadIdx.x] = 0;
  const int length = limit.lengths[sequence * limit.length_sequence_stride + head * limit.length_head_stride];
  const int64_t capacity = int64_t{layer.page_size} * limit.pages_per_row;
  bool wrong = length < 0 || length > g.max_length || length > capacity;
  if (!wrong) {
    const int pages = (length + layer.page_size - 1) / layer.page_size;
    const int32_t* table =
        layer.page_table == nullptr ? nullptr : layer.page_table + sequence * layer.table_sequence_stride + head * layer.table_head_stride;
    for (int page = threadIdx.x; page < pages; page += kPlanThreads) {
      const int64_t id = table == nullptr ? sequence : table[page];
      const int64_t rows = min(layer.page_size, length - page * layer.page_size);
      wrong = wrong || id < 0 || !page_fits(layer.key, limit.key_bytes, id, rows, head, row_bytes) ||
              !page_fits(layer.value, limit.value_bytes, id, rows, head, row_bytes) ||
              !page_fits(layer.position, limit.position_bytes, id, rows, head, 4) ||
              !page_fits(layer.value_norm, limit.value_norm_bytes, id, rows, head, 4);
    }
  }
  wrong = __syncthreads_or(wrong) != 0;
  if (threadIdx.x != 0) return;
  if (wrong) report_status(g.status, LPX_OUT_OF_BOUNDS);
  lengths[segment] = wrong ? 0 : length;
  contexts[segment] = wrong ? 0 : layer.position.data == nullptr ? length : context_lengths[sequence];
}

// <<<segments, kPlanThreads>>>: the original position of every token, at x * stride + t.
__global__ void write_positions_kernel(Geometry g, int32_t* positions) {
  follow_previous();
  const int segment = blockIdx.x;
  const LayerView& layer = g.layer[g.layer_of(segment)];
  for (int token = threadIdx.x; token < g.lengths[segment]; token += kPlanThreads)
    positions[segment * g.stride + token] = token_position(layer, g.sequence_of(segment), g.head_of(segment), token);
}

// Contexts of segments from those of sequences.
__global__ void spread_contexts_kernel(const int32_t* context_lengths, int sequences, int kv_heads, int segments, int32_t* contexts) {
  follow_previous();
  const int segment = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (segment < segments) contexts[segment] = context_lengths[segment / kv_heads % sequences];
}

}  // namespace laprox::cuda
