// Kept rows move to where they stay: keys, values, value norms and positions.
//
// Bytes: each kept row of K and V is read once and written once, 4 * row_bytes a kept entry; nothing else counts.
//
//   plan_pages / plan_freed   one block: checks, page tables, how many pages of which list (thousands of integers)
//   move_rows                 out of place. A warp takes 32 kept rows: each lane finds the addresses of one, then the warp copies
//                             row after row, 16 bytes a lane and 8 of them in flight, whatever the row's size
//   move_in_place             rows move towards the front of their segment: row i lands at or before where it was, and before
//                             every later row. So a block walks a segment forward in rounds; what is read in a round or before it
//                             may be overwritten after it, and the next round's rows are all behind what this one writes.
#pragma once

#include "cuda/kernels/blocks.cuh"
#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

inline constexpr int kMoveThreads = 256;
inline constexpr int kInPlaceThreads = 1024;
inline constexpr int kInFlight = 4;  // 16-byte pieces of keys, and as many of values, that a lane has under way
inline constexpr int kListThreads = 1024;

// Where the rows of one layer go.
struct TargetLayer {
  PlaneView key;
  PlaneView value;
  PlaneView position;    // data null: not wanted
  PlaneView value_norm;  // likewise
  int64_t key_bytes;     // that may be touched from key.data, and so on
  int64_t value_bytes;
  int64_t position_bytes;
  int64_t value_norm_bytes;
  int32_t page_size;
  const int32_t* free_pages;  // of the layer, or of all layers
  int64_t free_count;
};

// Parameters of a kernel hold so many.
struct TargetChunk {
  static constexpr int kSize = 16;
  TargetLayer layer[kSize];
};

struct Move {
  Geometry from;
  const int32_t* tokens;   // of the selection
  const int64_t* offsets;  // [segments + 1]
  int64_t capacity;
  int32_t target;            // lpx_target
  TargetLayer flat;          // of a ragged target
  const TargetLayer* layer;  // [layers] of pages
  int32_t row_bytes;
  int32_t* lengths;     // [segments] or null
  int32_t* page_table;  // [segments, table_width]
  int32_t table_width;
  int64_t* pages_used;  // [free lists]
  int32_t free_lists;
  int64_t* first_page;  // [segments]: in its free list
  int32_t* freed_pages;
  int64_t freed_capacity;
  int64_t* freed_counts;  // [layers]
  int64_t* first_freed;   // [segments]
};

__device__ inline int64_t pages_for(int64_t rows, int64_t page_size) { return (rows + page_size - 1) / page_size; }

// Whether `rows` rows of a page stay inside the target.
__device__ inline bool inside(const PlaneView& plane, int64_t bytes, int64_t page, int64_t rows, int64_t row_bytes) {
  if (plane.data == nullptr || rows == 0) return true;
  return page >= 0 && page * plane.page_stride + (rows - 1) * plane.token_stride + row_bytes <= bytes;
}

// Where rows go, from the parameters.
__global__ void store_targets(const __grid_constant__ TargetChunk chunk, int count, TargetLayer* to) {
  follow_previous();
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = chunk.layer[i];
}

// Whether so many rows of a ragged target stay inside it.
__device__ inline bool flat_holds(const Move& m, int64_t rows) {
  const TargetLayer& flat = m.flat;
  return inside(flat.key, flat.key_bytes, 0, rows, m.row_bytes) && inside(flat.value, flat.value_bytes, 0, rows, m.row_bytes) &&
         inside(flat.position, flat.position_bytes, 0, rows, 4) && inside(flat.value_norm, flat.value_norm_bytes, 0, rows, 4);
}

__device__ inline void store_length(const Move& m, int segment) {
  if (m.lengths != nullptr) m.lengths[segment] = static_cast<int32_t>(m.offsets[segment + 1] - m.offsets[segment]);
}

// A selection that fits: offsets ascend, tokens ascend inside their segment. Reads every token once.
__global__ void __launch_bounds__(256) check_tokens(const __grid_constant__ Move m) {
  follow_previous();
  if (*m.from.status != LPX_OK) return;
  for (int segment = blockIdx.y; segment < m.from.segments; segment += gridDim.y) {
    const int64_t begin = m.offsets[segment];
    const int64_t end = m.offsets[segment + 1];
    bool wrong = begin < 0 || end < begin || end > m.capacity || end - begin > m.from.lengths[segment] || (segment == 0 && begin != 0);
    if (!wrong)
      for (int64_t e = begin + blockIdx.x * blockDim.x + threadIdx.x; e < end; e += int64_t{gridDim.x} * blockDim.x) {
        const int token = m.tokens[e];
        wrong |= token >= m.from.lengths[segment] || token <= (e == begin ? -1 : m.tokens[e - 1]);
      }
    if (wrong) report_status(m.from.status, LPX_OUT_OF_BOUNDS);
  }
}

// Pages of each segment from the free lists, in the order of segments. Everything is checked here; one block.
__global__ void __launch_bounds__(kListThreads) plan_pages(const __grid_constant__ Move m) {
  follow_previous();
  if (*m.from.status != LPX_OK) return;
  __shared__ int64_t scratch[32];
  const int per_layer = m.from.sequences * m.from.kv_heads;
  const int per_list = m.free_lists == 1 ? m.from.segments : per_layer;
  for (int list = 0; list < m.free_lists; ++list) {
    int64_t used = 0;
    for (int first = 0; first < per_list; first += blockDim.x) {
      const int i = first + static_cast<int>(threadIdx.x);
      const int segment = list * per_list + i;
      int64_t pages = 0;
      if (i < per_list) {
        const TargetLayer& to = m.layer[m.from.layer_of(segment)];
        pages = pages_for(m.offsets[segment + 1] - m.offsets[segment], to.page_size);
        if (pages > m.table_width) report_status(m.from.status, LPX_OUT_OF_BOUNDS);
      }
      const Prefix own = block_prefix(pages, scratch);
      const int64_t before = used + own.before;
      if (i < per_list) {
        m.first_page[segment] = before;
        if (before + pages > m.layer[m.from.layer_of(segment)].free_count) report_status(m.from.status, LPX_OUT_OF_PAGES);
      }
      used += own.total;
    }
    if (threadIdx.x == 0) m.pages_used[list] = used;
  }
}

// The pages of each segment, a block a segment: the table, and whether the rows stay inside the target.
__global__ void __launch_bounds__(256) fill_tables(const __grid_constant__ Move m) {
  follow_previous();
  if (*m.from.status != LPX_OK) return;
  for (int segment = blockIdx.x; segment < m.from.segments; segment += gridDim.x) {
    const TargetLayer& to = m.layer[m.from.layer_of(segment)];
    const int64_t kept = m.offsets[segment + 1] - m.offsets[segment];
    const int64_t pages = pages_for(kept, to.page_size);
    for (int p = threadIdx.x; p < m.table_width; p += blockDim.x) {
      int32_t page = -1;
      if (p < pages) {
        page = to.free_pages[m.first_page[segment] + p];
        const int64_t rows = min(int64_t{to.page_size}, kept - int64_t{p} * to.page_size);
        if (!inside(to.key, to.key_bytes, page, rows, m.row_bytes) || !inside(to.value, to.value_bytes, page, rows, m.row_bytes) ||
            !inside(to.position, to.position_bytes, page, rows, 4) || !inside(to.value_norm, to.value_norm_bytes, page, rows, 4))
          report_status(m.from.status, LPX_OUT_OF_BOUNDS);
      }
      m.page_table[int64_t{segment} * m.table_width + p] = page;
    }
  }
}

// Pages whose every row has moved away: behind the longest kept segment that uses them. One block.
__global__ void __launch_bounds__(kListThreads) plan_freed(const __grid_constant__ Move m) {
  follow_previous();
  if (*m.from.status != LPX_OK) return;
  __shared__ int64_t scratch[32];
  int64_t listed = 0;
  int64_t freeable = 0;
  const int per_layer = m.from.sequences * m.from.kv_heads;
  for (int l = 0; l < m.from.layers; ++l) {
    const LayerView& layer = m.from.layer[l];
    const bool shared = layer.table_head_stride == 0;
    const int64_t before_layer = listed;
    for (int first = 0; first < per_layer && layer.page_table != nullptr; first += blockDim.x) {
      const int i = first + static_cast<int>(threadIdx.x);
      const int segment = l * per_layer + i;
      int64_t freed = 0;
      int64_t most = 0;
      if (i < per_layer && (!shared || i % m.from.kv_heads == 0)) {
        int64_t kept = 0;
        int64_t used = 0;
        for (int head = 0; head < (shared ? m.from.kv_heads : 1); ++head) {
          kept = max(kept, pages_for(m.offsets[segment + head + 1] - m.offsets[segment + head], layer.page_size));
          used = max(used, pages_for(m.from.lengths[segment + head], layer.page_size));
        }
        freed = used - kept;
        most = shared ? pages_for(m.from.lengths[segment], layer.page_size) : used;
      }
      const Prefix own = block_prefix(freed, scratch);
      if (i < per_layer) m.first_freed[segment] = listed + own.before;
      listed += own.total;
      freeable += block_sum(most, scratch);
    }
    if (threadIdx.x == 0 && m.freed_counts != nullptr) m.freed_counts[l] = listed - before_layer;
  }
  if (threadIdx.x == 0 && (freeable > m.freed_capacity || listed > m.freed_capacity)) report_status(m.from.status, LPX_OUT_OF_BOUNDS);
}

__global__ void __launch_bounds__(256) list_freed(const __grid_constant__ Move m) {
  follow_previous();
  if (*m.from.status != LPX_OK) return;
  for (int segment = blockIdx.y; segment < m.from.segments; segment += gridDim.y) {
    const LayerView& layer = m.from.layer[m.from.layer_of(segment)];
    const bool shared = layer.table_head_stride == 0;
    const int head = m.from.head_of(segment);
    if (layer.page_table == nullptr || (shared && head != 0)) continue;
    int64_t kept = 0;
    int64_t used = 0;
    for (int other = 0; other < (shared ? m.from.kv_heads : 1); ++other) {
      kept = max(kept, pages_for(m.offsets[segment + other + 1] - m.offsets[segment + other], layer.page_size));
      used = max(used, pages_for(m.from.lengths[segment + other], layer.page_size));
    }
    const int32_t* table = layer.page_table + m.from.sequence_of(segment) * layer.table_sequence_stride + head * layer.table_head_stride;
    for (int64_t p = kept + blockIdx.x * blockDim.x + threadIdx.x; p < used; p += int64_t{gridDim.x} * blockDim.x)
      m.freed_pages[m.first_freed[segment] + p - kept] = table[p];
  }
}

__device__ inline uint4 load_streamed(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Copies row `row` of `count` from lane `row`'s addresses, pieces of T dealt out to the lanes.
template <typename T>
__device__ inline void copy_rows(const char* key, char* key_to, const char* value, char* value_to, int count, int row_bytes, int lane) {
  const int pieces = row_bytes / static_cast<int>(sizeof(T));
  const int all = count * pieces;
  for (int first = 0; first < all; first += 32 * kInFlight) {
    T keys[kInFlight];
    T values[kInFlight];
    char* keys_to[kInFlight];
    char* values_to[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int index = first + i * 32 + lane;
      const int row = min(index / pieces, 31);
      const int64_t piece = (index - row * pieces) * static_cast<int64_t>(sizeof(T));
      const auto from = reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(key), row)) + piece;
      const auto from_value = reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(value), row)) + piece;
      keys_to[i] = reinterpret_cast<char*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(key_to), row)) + piece;
      values_to[i] = reinterpret_cast<char*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(value_to), row)) + piece;
      if (index >= all) continue;
      if constexpr (sizeof(T) == 16) {
        keys[i] = load_streamed(reinterpret_cast<const uint4*>(from));
        values[i] = load_streamed(reinterpret_cast<const uint4*>(from_value));
      } else {
        keys[i] = *reinterpret_cast<const T*>(from);
        values[i] = *reinterpret_cast<const T*>(from_value);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * 32 + lane >= all) continue;
      __stcs(reinterpret_cast<T*>(keys_to[i]), keys[i]);
      __stcs(reinterpret_cast<T*>(values_to[i]), values[i]);
    }
  }
}

// Finds the segment of kept entry e, from one that is not behind it.
__device__ inline int segment_of_entry(const int64_t* offsets, int segments, int64_t e) {
  int low = 0;
  for (int high = segments - 1; low < high;) {
    const int middle = low + (high - low + 1) / 2;
    if (offsets[middle] <= e)
      low = middle;
    else
      high = middle - 1;
  }
  return low;  // the last that begins at or before e: segments without entries are passed over
}

__device__ inline char* row_at(const PlaneView& plane, int64_t page, int64_t slot) {
  return plane.data + page * plane.page_stride + slot * plane.token_stride;
}

__global__ void __launch_bounds__(kMoveThreads) move_rows(const __grid_constant__ Move m) {
  follow_previous();
  const int64_t total = m.offsets[m.from.segments];
  if (*m.from.status != LPX_OK) return;
  if (m.target == LPX_TO_RAGGED && !flat_holds(m, total)) {  // all threads see that alike
    report_status(m.from.status, LPX_OUT_OF_BOUNDS);
    return;
  }
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < m.from.segments; i += static_cast<int>(gridDim.x * blockDim.x))
    store_length(m, i);
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t{gridDim.x} * (kMoveThreads / 32);
  const int64_t warp = int64_t{blockIdx.x} * (kMoveThreads / 32) + threadIdx.x / 32;
  for (int64_t first = warp * 32; first < total; first += warps * 32) {
    const int64_t e = min(first + lane, total - 1);
    const int count = static_cast<int>(min(int64_t{32}, total - first));
    const int segment = segment_of_entry(m.offsets, m.from.segments, e);
    const int token = m.tokens[e];
    const int l = m.from.layer_of(segment);
    const LayerView& from = m.from.layer[l];
    const int sequence = m.from.sequence_of(segment);
    const int head = m.from.head_of(segment);
    const TargetLayer& to = m.target == LPX_TO_RAGGED ? m.flat : m.layer[l];
    int64_t page = 0;
    int64_t slot = e;
    if (m.target == LPX_TO_PAGES) {
      const int row = static_cast<int>(e - m.offsets[segment]);
      page = m.page_table[int64_t{segment} * m.table_width + row / to.page_size];
      slot = row % to.page_size;
    }
    const char* key = Rows(from, from.key, sequence, head)(token);
    const char* value = Rows(from, from.value, sequence, head)(token);
    char* key_to = row_at(to.key, page, slot);
    char* value_to = row_at(to.value, page, slot);
    if (lane < count) {
      if (to.position.data != nullptr) *reinterpret_cast<int32_t*>(row_at(to.position, page, slot)) = token_position(from, sequence, head, token);
      if (to.value_norm.data != nullptr && from.value_norm.data != nullptr)
        *reinterpret_cast<uint32_t*>(row_at(to.value_norm, page, slot)) =
            *reinterpret_cast<const uint32_t*>(Rows(from, from.value_norm, sequence, head)(token));
    }
    const uint64_t bits = reinterpret_cast<uint64_t>(key) | reinterpret_cast<uint64_t>(value) | reinterpret_cast<uint64_t>(key_to) |
                          reinterpret_cast<uint64_t>(value_to) | static_cast<uint64_t>(m.row_bytes);
    if (__all_sync(~0u, bits % 16 == 0))
      copy_rows<uint4>(key, key_to, value, value_to, count, m.row_bytes, lane);
    else if (__all_sync(~0u, bits % 4 == 0))
      copy_rows<uint32_t>(key, key_to, value, value_to, count, m.row_bytes, lane);
    else
      copy_rows<uint16_t>(key, key_to, value, value_to, count, m.row_bytes, lane);
  }
}

// One plane of a segment, rows of `row_bytes` in pieces of T. All threads of the block.
template <typename T>
__device__ inline void shift_rows(const Rows& rows, const int32_t* tokens, int kept, int row_bytes) {
  constexpr int kPieces = 4;
  const int pieces = row_bytes / static_cast<int>(sizeof(T));
  const int64_t all = int64_t{kept} * pieces;
  constexpr int64_t kRound = int64_t{kInPlaceThreads} * kPieces;
  T held[kPieces];
  const auto read = [&](int64_t round, T* to) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t index = round + i * kInPlaceThreads + threadIdx.x;
      if (index >= all) continue;
      const int row = static_cast<int>(index / pieces);
      to[i] = __ldcs(reinterpret_cast<const T*>(rows(tokens[row])) + (index - int64_t{row} * pieces));
    }
  };
  const auto write = [&](int64_t round, const T* from) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int64_t index = round + i * kInPlaceThreads + threadIdx.x;
      if (index >= all) continue;
      const int row = static_cast<int>(index / pieces);
      reinterpret_cast<T*>(const_cast<char*>(rows(row)))[index - int64_t{row} * pieces] = from[i];
    }
  };
  read(0, held);
  for (int64_t round = 0; round < all; round += kRound) {
    T next[kPieces];
    if (round + kRound < all) read(round + kRound, next);
    __syncthreads();  // what this round overwrites has been read
    write(round, held);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) held[i] = next[i];
  }
  __syncthreads();
}

// A block a plane and segment.
__global__ void __launch_bounds__(kInPlaceThreads) move_in_place(const __grid_constant__ Move m) {
  follow_previous();
  if (*m.from.status != LPX_OK) return;
  const int segment = blockIdx.x;
  if (blockIdx.y == 0 && threadIdx.x == 0) store_length(m, segment);
  const LayerView& layer = m.from.layer[m.from.layer_of(segment)];
  const int sequence = m.from.sequence_of(segment);
  const int head = m.from.head_of(segment);
  const int32_t* tokens = m.tokens + m.offsets[segment];
  const int kept = static_cast<int>(m.offsets[segment + 1] - m.offsets[segment]);
  if (blockIdx.y == 2) {
    if (layer.position.data != nullptr) shift_rows<uint32_t>(Rows(layer, layer.position, sequence, head), tokens, kept, 4);
    if (layer.value_norm.data != nullptr) shift_rows<uint32_t>(Rows(layer, layer.value_norm, sequence, head), tokens, kept, 4);
    return;
  }
  const PlaneView& plane = blockIdx.y == 0 ? layer.key : layer.value;
  const Rows rows(layer, plane, sequence, head);
  const uint64_t bits = reinterpret_cast<uint64_t>(plane.data) | static_cast<uint64_t>(plane.page_stride) |
                        static_cast<uint64_t>(plane.token_stride) | static_cast<uint64_t>(plane.head_stride) | static_cast<uint64_t>(m.row_bytes);
  if (bits % 16 == 0)
    shift_rows<uint4>(rows, tokens, kept, m.row_bytes);
  else if (bits % 4 == 0)
    shift_rows<uint32_t>(rows, tokens, kept, m.row_bytes);
  else
    shift_rows<uint16_t>(rows, tokens, kept, m.row_bytes);
}

}  // namespace laprox::cuda
