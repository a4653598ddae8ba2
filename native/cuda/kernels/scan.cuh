// What the kernels of the scan share: which tokens the window sees, the rows' layout, the sample, and the end of it all.
//
//   b[h,q]      = log2 sum over the sample of 2^s, or the given log-sum-exp       (s = logit in base 2)
//   e           = 2^(s - b)
//   lse[h,q]    = b + log2(sum over tokens of e [+ 2^(sink - b)])
//   roots[h,i]  = root of the sum over the rows of e^2, rounded up to bfloat16,   ||a_h[:,i]|| <= inflation[h] * roots[h,i]
//
// Rows: query head h of a KV head has `head_rows` rows, m rounded up to 32, so that a block of 32 rows (a *band*) belongs to one
// head. A *panel* is the 1 to 4 bands that one thread block multiplies with a run of tokens; a segment has `panels`
// panels and `padded_rows` rows. Rows that pad or do not exist have the reference +inf: their e is 0 without a mask.
//
// Tiles of kScanTile tokens that some row sees are numbered segment by segment, and dealt to `workers` blocks of each panel in equal shares of
// consecutive ones: a worker has the end of a segment, whole ones, the begin of another. Its part of segment x, a *piece*, is number worker + x
// of all, so that a sum over tokens is that of consecutive pieces, in order. How many workers there are depends on the kernel and not on the chip:
// results do not either.
//
// A reference that was outgrown (a token outside the sample far above it: the sum of e is not finite) is repaired by an online
// log-sum-exp over all tokens of the segment. The roots stay: those that overflowed are +inf, which is a bound.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels/mma.cuh"
#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

inline constexpr int kBand = 32;      // query rows
inline constexpr int kScanTile = 64;  // tokens
// Tokens of the reference point: the first, a strided part, the last. A sixteenth of them all, or 512 and one of 128 where that is less, but from 256
// to 1024: what is sampled is multiplied twice, and a reference that is off makes bounds loose.
inline constexpr int kSinkSample = 4;
inline constexpr int kRecentSample = 128;
inline constexpr int kLeastSample = 256;
inline constexpr int kMostSample = 1024;
inline constexpr float kVanishedSquares = 2e-36f;  // what sums of e^2 of up to 128 rows may lose below the smallest float

// Tokens [begin, end) are seen by some row, [full_begin, full_end) by every row that exists.
struct Range {
  int32_t begin;
  int32_t full_begin;
  int32_t full_end;
  int32_t end;
};

struct ScanView {
  Geometry g;
  float* references;     // [segments][padded_rows]: b
  float* partials;       // [segments + workers][padded_rows]: sums of e of each piece; in a repair, log-sum-exps
  __nv_bfloat16* roots;  // [segments][panels][stride][panel_heads], or null
  Range* ranges;         // [segments]
  int32_t* first_tile;   // [segments + 1]
  int32_t* outgrown;     // [segments + 1]: references that were outgrown; the last: whether any was
  int32_t head_rows;
  int32_t padded_rows;
  int32_t panels;
  int32_t panel_bands;
  int32_t workers;  // of a panel

  __host__ __device__ int head_bands() const { return head_rows / kBand; }
  __host__ __device__ int panel_heads() const { return panel_bands / head_bands(); }
  // With a given log-sum-exp and no roots to find there is nothing to do.
  __device__ bool skips(const LayerView& layer) const { return layer.lse != nullptr && roots == nullptr; }
};

// The number of tokens in the sample of `count`.
__device__ inline int sample_size(int count) { return min(count, min(max(min(count / 16, 512 + count / 128), kLeastSample), kMostSample)); }

__device__ inline __nv_bfloat16 rounded_up(float x) {  // not negative; what is not a number stays that
  const uint32_t bits = min(__float_as_uint(x), 0x7fff0000u);
  return __ushort_as_bfloat16(static_cast<unsigned short>((bits + 0xffff) >> 16));
}
__device__ inline float root(float x) {  // to a few units in the last place
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline __nv_bfloat16 root_of_squares(float squares) { return rounded_up(root(squares + kVanishedSquares)); }

// Products to logits in base 2, as logit2 does, without a division an element.
struct LogitRule {
  float scale;
  float inner;  // of the soft-cap: outer * tanh(inner * product)
  float outer;
  bool capped;

  __device__ explicit LogitRule(const LayerView& layer)
      : scale(layer.scale * kLog2E), inner(layer.scale / layer.soft_cap), outer(layer.soft_cap * kLog2E), capped(layer.soft_cap > 0) {}
  __device__ float operator()(float product) const { return capped ? outer * tanhf(product * inner) : product * scale; }
  // Of a soft-cap, within some 1e-7 of `outer`.
  __device__ float capped_logit(float product) const { return outer * (1 - __fdividef(2.0f, 1 + exp2_fast(product * (2 * kLog2E * inner)))); }
  // In place.
  template <int N>
  __device__ void apply(float (&products)[N]) const {
    if (capped) {
#pragma unroll
      for (int i = 0; i < N; ++i) products[i] = outer * tanhf(products[i] * inner);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) products[i] *= scale;
    }
  }

 private:
  static constexpr float kLog2E = 1.44269504088896340736f;
};

// A panel's rows in global terms: row `i` of band `band`.
struct PanelRow {
  int head;  // of the group
  int query;
};
__device__ inline PanelRow panel_row(const ScanView& v, int panel, int band, int i) {
  const int global = panel * v.panel_bands + band;
  return {global / v.head_bands(), global % v.head_bands() * kBand + i};
}
__device__ inline bool row_exists(const ScanView& v, int segment, PanelRow row) {
  return row.head < v.g.group && row.query < v.g.rows && v.g.row_position(segment, row.query) >= 0;
}

// The number of tokens at positions up to `limit`; positions ascend. All 32 lanes of a warp call it.
__device__ inline int tokens_up_to(const LayerView& layer, int sequence, int head, int length, int limit) {
  if (layer.position.data == nullptr) return min(max(limit + 1, 0), length);
  const int lane = threadIdx.x % 32;
  int low = 0;
  int high = length;
  while (low < high) {
    const int step = (high - low + 31) / 32;
    const int token = low + (lane + 1) * step - 1;
    const bool up_to = token < high && token_position(layer, sequence, head, token) <= limit;
    const int count = __popc(__ballot_sync(0xffffffffu, up_to));
    high = min(high, low + (count + 1) * step - 1);
    low = min(high, low + count * step);
  }
  return low;
}

__device__ inline Range range_of(const Geometry& g, const LayerView& layer, int segment) {
  const int sequence = g.sequence_of(segment);
  const int head = g.head_of(segment);
  const int length = g.lengths[segment];
  const int last = g.row_position(segment, g.rows - 1);
  if (last < 0 || length == 0) return {0, 0, 0, 0};
  const int first = max(0, g.row_position(segment, 0));
  Range range;
  range.begin = layer.sliding_window == 0 ? 0 : tokens_up_to(layer, sequence, head, length, first - layer.sliding_window);
  range.full_begin = layer.sliding_window == 0 ? 0 : tokens_up_to(layer, sequence, head, length, last - layer.sliding_window);
  range.full_end = tokens_up_to(layer, sequence, head, length, first);
  range.end = tokens_up_to(layer, sequence, head, length, last);
  return range;
}

// Token `i` of the sample of `range`, of `size` tokens.
__device__ inline int sample_token(const Range& range, int size, int i) {
  const int count = range.end - range.begin;
  if (count == size || i < kSinkSample) return range.begin + i;
  if (i >= size - kRecentSample) return range.end - size + i;
  const int middle = count - kSinkSample - kRecentSample;
  const int strided = size - kSinkSample - kRecentSample;
  return range.begin + kSinkSample + (i - kSinkSample) * (middle / strided) + min(i - kSinkSample, middle % strided);
}

// A worker's part of a segment.
struct Piece {
  int segment;
  int first;  // token, a multiple of kScanTile
  int tiles;
  int64_t index;
};

// Workers that have a tile: the first ones.
__device__ inline int busy_workers(const ScanView& v) { return min(v.workers, v.first_tile[v.g.segments]); }

// A worker's pieces, one after another: `while (pieces.next(piece))`. Made by whole warps.
class Pieces {
 public:
  // `listed`: tiles are of lists of tokens, and those of a segment begin at 0.
  __device__ Pieces(const ScanView& v, int worker, bool listed = false) : v_(v), worker_(worker), listed_(listed) {
    const int64_t all = v.first_tile[v.g.segments];
    const int workers = busy_workers(v);
    if (worker >= workers) return;
    tile_ = static_cast<int>(all * worker / workers);
    end_ = static_cast<int>(all * (worker + 1) / workers);
    segment_ = segment_of_tile_together(v.first_tile, v.g.segments, tile_);
  }
  __device__ bool next(Piece& piece) {
    if (tile_ >= end_) return false;
    while (v_.first_tile[segment_ + 1] <= tile_) ++segment_;
    const int until = min(end_, v_.first_tile[segment_ + 1]);
    const int first = (listed_ ? 0 : v_.ranges[segment_].begin / kScanTile) + tile_ - v_.first_tile[segment_];
    piece = {segment_, first * kScanTile, until - tile_, int64_t{worker_} + segment_};
    tile_ = until;
    return true;
  }

 private:
  const ScanView& v_;
  int worker_;
  bool listed_;
  int tile_ = 0;
  int end_ = 0;
  int segment_ = 0;
};

// The worker of a tile: the w with all * w / workers <= tile < all * (w + 1) / workers, in whole numbers.
__device__ inline int worker_of(const ScanView& v, int tile) {
  return static_cast<int>(((int64_t{tile} + 1) * busy_workers(v) - 1) / v.first_tile[v.g.segments]);
}

// Copies tiles of kScanTile rows to shared memory, warp `warp` of the tile's some rows: WarpRows, or (0) its share of the block's. find() only asks
// for what has to be loaded (page numbers, a lane a row), a tile ahead: they are on the way while another tile is multiplied. Where a tile lies in
// one page (looked at if `Whole`: it takes registers) its first row's page is all there is to load. Tile::offset(row, chunk) is where 16 bytes go, of
// Tile::kChunks a row of Tile::kPitch bytes; chunks are XORed with the row mod 8.
template <typename Tile, int WarpRows = 0>
class TileCopier {
 public:
  // `listed`: rows are tokens of a list.
  __device__ TileCopier(const Rows& keys, int warp, bool listed = false)
      : keys_(keys),
        whole_(WarpRows > 0 && !listed && (keys.table == nullptr || keys.page_size % kScanTile == 0)),
        rows_(WarpRows > 0 ? WarpRows : (kScanTile * 32 / static_cast<int>(blockDim.x) + 7) / 8 * 8),
        first_(warp * rows_) {}

  // The tile of the tokens [first, first + kScanTile) below `end`; `first` is a multiple of kScanTile.
  __device__ void find(int first, int end) {
    if (whole_) {
      token_ = min(first, end - 1);
      valid_ = end - first;
      load_page();
    } else {
      find([&](int row) { return first + row < end ? first + row : -1; });
    }
  }
  // The tile whose row i is `token_of(i)`; negative: absent.
  template <typename TokenOf>
  __device__ void find(TokenOf token_of) {
    const int row = first_ + threadIdx.x % 32;
    const int token = row < kScanTile ? token_of(row) : -1;
    token_ = max(token, 0);
    valid_ = token >= 0;
    load_page();
  }
  // Starts the copies of the tile that was found.
  __device__ void copy(uint32_t to) const {
    const int lane = threadIdx.x % 32;
    const char* found = keys_.base + int64_t{page_} * keys_.page_stride + int64_t{slot_} * keys_.token_stride;
    if (whole_) {
      const int row = first_ + lane / kChunks;
      const char* from = found + row * keys_.token_stride + lane % kChunks * 16;
      const uint32_t lane_to = Tile::offset(row, lane % kChunks);
#pragma unroll
      for (int i = 0; i < WarpRows; i += kLaneRows) {
        copy_async_16(to + (lane_to ^ i % 8 * 16) + i * Tile::kPitch, from, row + i < valid_);
        from += kLaneRows * keys_.token_stride;
      }
      return;
    }
    const uint64_t tagged = reinterpret_cast<uint64_t>(found) | (valid_ != 0 ? 0 : kAbsent);
#pragma unroll WarpRows> 0 ? WarpRows* kChunks / 32 : 4
    for (int i = 0; i < rows_ * kChunks; i += 32) {
      const int row = (i + lane) / kChunks;
      const int chunk = (i + lane) % kChunks;
      const uint64_t from = __shfl_sync(0xffffffffu, tagged, row);
      if (WarpRows > 0 || first_ + row < kScanTile)
        copy_async_16(to + Tile::offset(first_ + row, chunk), reinterpret_cast<const char*>(from & ~kAbsent) + chunk * 16, (from & kAbsent) == 0);
    }
  }

 private:
  static constexpr uint64_t kAbsent = 1;  // rows are aligned
  static constexpr int kChunks = Tile::kChunks;
  static constexpr int kLaneRows = 32 / kChunks;  // rows that a warp copies at a time
  static_assert(WarpRows == 0 || 32 % kChunks == 0, "a warp copies whole rows");

  __device__ void load_page() {
    if (keys_.table == nullptr) {
      page_ = keys_.sequence;
      slot_ = token_;
    } else {
      const int index = keys_.page_shift >= 0 ? token_ >> keys_.page_shift : token_ / keys_.page_size;
      page_ = keys_.table[index];
      slot_ = token_ - index * keys_.page_size;
    }
  }

  const Rows& keys_;
  bool whole_;
  int rows_;   // of a warp, a multiple of 8
  int first_;  // of this warp
  int token_ = 0;
  int page_ = 0;
  int slot_ = 0;
  int valid_ = 0;
};

// Exists, so the row's log-sum-exp is what the caller gave.
__device__ inline float given_lse(const Geometry& g, const LayerView& layer, int segment, PanelRow row) {
  const int64_t head = int64_t{g.head_of(segment)} * g.group + row.head;
  return g.lse_scale * *reinterpret_cast<const float*>(layer.lse + g.sequence_of(segment) * layer.lse_sequence_stride + head * layer.lse_head_stride +
                                                       row.query * layer.lse_row_stride);
}

// First of all kernels of a call, a block a (segment, panel): what the sample needs of its segment. Returns whether there is a
// sample to take: not for a given log-sum-exp, which becomes the reference here.
__device__ inline bool prepare_segment(const ScanView& v, const LayerView& layer, int segment, int panel, Range& range) {
  __shared__ Range shared;
  if (threadIdx.x < 32) {
    const Range found = range_of(v.g, layer, segment);
    if (threadIdx.x == 0) shared = found;
  }
  __syncthreads();
  range = shared;
  if (threadIdx.x == 0 && panel == 0) {
    v.ranges[segment] = range;
    v.outgrown[segment] = 0;
    if (segment == 0) v.outgrown[v.g.segments] = 0;
  }
  if (layer.lse == nullptr) return true;
  for (int i = threadIdx.x; i < v.panel_bands * kBand; i += blockDim.x) {
    const PanelRow row = panel_row(v, panel, i / kBand, i % kBand);
    v.references[int64_t{segment} * v.padded_rows + panel * v.panel_bands * kBand + i] =
        row_exists(v, segment, row) ? given_lse(v.g, layer, segment, row) : INFINITY;
  }
  return false;
}

// Running sum of 2^x of one row, from its largest x.
struct OnlineSum {
  float largest = -INFINITY;
  float sum = 0;

  // Adds 2^x of `N` numbers.
  template <int N>
  __device__ void add(const float (&x)[N]) {
    float most = largest;
#pragma unroll
    for (int i = 0; i < N; ++i) most = fmaxf(most, x[i]);
    const float base = most == -INFINITY ? 0.0f : most;
    float total = sum * exp2_fast(largest - base);
#pragma unroll
    for (int i = 0; i < N; ++i) total += exp2_fast(x[i] - base);
    sum = total;
    largest = most;
  }
  __device__ void add(const OnlineSum& other) {
    const float most = fmaxf(largest, other.largest);
    const float base = most == -INFINITY ? 0.0f : most;
    sum = sum * exp2_fast(largest - base) + other.sum * exp2_fast(other.largest - base);
    largest = most;
  }
  // -inf where nothing was added.
  __device__ float log_sum() const { return largest + log2f(sum); }
};

}  // namespace laprox::cuda
