// What every kernel sees of a call: caches, windows and model as plain structs of device pointers and byte strides.
//
// Segments are numbered (layer * sequences + sequence) * kv_heads + head, as in laprox.h. Arrays "per token" that laprox keeps
// between stages (scores, bounds, candidates) hold `stride` slots a segment: token t of segment x is at x * stride + t.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "laprox/laprox.h"

namespace laprox::cuda {

// What every kernel does before it touches memory: its blocks may have been brought onto the chip while the kernel before it in
// the stream was still at work (launch/launch.hpp). Lets the next one come, too, which waits in turn. What a kernel reads may thus have been
// written after its blocks were there: no load is by the non-coherent path (__ldg), which presumes that nothing changes.
__device__ inline void let_next_come() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void follow_previous() {
  let_next_come();
  wait_for_previous();
}

// Two kernels in a row, the second of which needs nothing of the first, work side by side: the first one begins with lead_next(), so that all that
// was before it is over when the second one comes. That begins with accompany_previous(true) and ends with wait_for_previous(), so that what
// follows has both behind it.
__device__ inline void lead_next() {
  wait_for_previous();
  let_next_come();
}
__device__ inline void accompany_previous(bool beside) {
  let_next_come();
  if (!beside) wait_for_previous();
}

struct PlaneView {
  char* data;  // null: absent
  int64_t page_stride;
  int64_t token_stride;
  int64_t head_stride;
};

// One layer: its cache, its window and its attention. An array of them lies in the call's workspace on the device.
struct LayerView {
  PlaneView key;
  PlaneView value;
  PlaneView position;
  PlaneView value_norm;
  const int32_t* page_table;  // null: the page is the sequence
  int64_t table_sequence_stride;
  int64_t table_head_stride;
  int32_t page_size;
  int32_t page_shift;  // log2(page_size), or -1
  // The window.
  const char* queries;
  int64_t query_sequence_stride;
  int64_t query_head_stride;
  int64_t query_row_stride;
  const char* lse;  // null: computed
  int64_t lse_sequence_stride;
  int64_t lse_head_stride;
  int64_t lse_row_stride;
  // The attention. Logits are in base 2: q.k * scale * log2(e), soft-capped where soft_cap > 0.
  float scale;
  float soft_cap;
  int32_t sliding_window;
  const float* sink_logits;  // device, [query_heads]; null: none
  float weight;              // multiplies scores
};

// Kernels whose last block does something for all: a counter each, of the blocks that have come to their end.
enum Arrival { kSampled, kRepaired, kArrivals };

// The shape of a call. Passed by value.
struct Geometry {
  const LayerView* layer;   // [layers]
  const int32_t* lengths;   // [segments]: checked tokens of each; 0 where something about a segment is wrong
  const int32_t* contexts;  // [segments]: position of the next token
  int32_t* status;          // lpx_status of the call so far; kernels stop early where it is not LPX_OK
  uint32_t* arrivals;       // [kArrivals]
  int32_t layers;
  int32_t sequences;
  int32_t kv_heads;
  int32_t group;     // R: query heads of a KV head
  int32_t head_dim;  // d
  int32_t rows;      // m: queries of the window
  int32_t max_length;
  int32_t segments;
  int64_t stride;   // slots per segment of per-token arrays: a multiple of 4, at least max_length
  float lse_scale;  // takes a given log-sum-exp to base 2

  __device__ int layer_of(int segment) const { return segment / (sequences * kv_heads); }
  __device__ int sequence_of(int segment) const { return segment / kv_heads % sequences; }
  __device__ int head_of(int segment) const { return segment % kv_heads; }
  // Position that window row q stands at; negative: the row does not exist.
  __device__ int row_position(int segment, int q) const { return contexts[segment] - rows + q; }
};

// Finds the rows of one plane and segment.
struct Rows {
  const char* base;
  const int32_t* table;
  int64_t page_stride;
  int64_t token_stride;
  int32_t page_size;
  int32_t page_shift;
  int32_t sequence;

  __device__ Rows(const LayerView& layer, const PlaneView& plane, int sequence_, int head)
      : base(plane.data + head * plane.head_stride),
        table(layer.page_table == nullptr ? nullptr : layer.page_table + sequence_ * layer.table_sequence_stride + head * layer.table_head_stride),
        page_stride(plane.page_stride),
        token_stride(plane.token_stride),
        page_size(layer.page_size),
        page_shift(layer.page_shift),
        sequence(sequence_) {}

  __device__ const char* operator()(int token) const {
    if (table == nullptr) return base + sequence * page_stride + token * token_stride;
    const int page = page_shift >= 0 ? token >> page_shift : token / page_size;
    return base + int64_t{table[page]} * page_stride + int64_t{token - page * page_size} * token_stride;
  }
};

__device__ inline int token_position(const LayerView& layer, int sequence, int head, int token) {
  if (layer.position.data == nullptr) return token;
  return *reinterpret_cast<const int32_t*>(Rows(layer, layer.position, sequence, head)(token));
}

__device__ inline const char* query_row(const Geometry& g, const LayerView& layer, int sequence, int kv_head, int group_head, int row) {
  return layer.queries + sequence * layer.query_sequence_stride + (int64_t{kv_head} * g.group + group_head) * layer.query_head_stride +
         row * layer.query_row_stride;
}

// A row at `row_position` sees a token at `position`.
__device__ inline bool sees(const LayerView& layer, int row_position, int position) {
  return row_position >= 0 && position <= row_position && (layer.sliding_window == 0 || row_position - position < layer.sliding_window);
}

// q.k as a logit in base 2.
__device__ inline float logit2(const LayerView& layer, float product) {
  constexpr float kLog2E = 1.44269504088896340736f;
  if (layer.soft_cap > 0) return layer.soft_cap * tanhf(product * layer.scale / layer.soft_cap) * kLog2E;
  return product * (layer.scale * kLog2E);
}

// The segment that a tile belongs to: the last one that begins at the tile or before it. Tiles are numbered segment by segment, and
// `first_tiles` [segments + 1] has where each begins. The search begins at segment `from`, and is short if that is near.
__device__ inline int segment_of_tile(const int32_t* first_tiles, int segments, int tile, int from = 0) {
  int low = from;
  int step = 1;
  while (low + step <= segments && first_tiles[low + step] <= tile) {
    low += step;
    step *= 2;
  }
  int high = min(low + step, segments);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_tiles[middle] <= tile)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The same, where all lanes of a warp ask for one tile: two steps for a thousand segments, wherever the tile is.
__device__ inline int segment_of_tile_together(const int32_t* first_tiles, int segments, int tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int low = 0;  // begins at the tile or before it
  int high = segments;
#pragma unroll 1
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const int at = low + (lane + 1) * step;
    const bool before = at < high && first_tiles[at] <= tile;
    low += __popc(__ballot_sync(~0u, before)) * step;
    high = min(high, low + step);
  }
  return low;
}

template <typename T>
__device__ inline float to_float(T x);
template <>
__device__ inline float to_float(float x) {
  return x;
}
template <>
__device__ inline float to_float(__half x) {
  return __half2float(x);
}
template <>
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// Whether a kernel before has failed, or one that works beside this one: the same for all threads of a block.
__device__ inline bool failed_together(const int32_t* status) {
  return __syncthreads_or(*static_cast<const volatile int32_t*>(status) != LPX_OK) != 0;
}

// What a call reports is the first thing that any of its kernels saw go wrong.
__device__ inline void report_status(int32_t* status, lpx_status what) { atomicCAS(status, LPX_OK, what); }

}  // namespace laprox::cuda
