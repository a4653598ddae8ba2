// The scan for any dtype, head dimension, group and window: the oracle of the fast kernels, and the path where they do not serve.
//
// A block takes a worker's pieces of a query head; 8 query rows at a time lie in shared memory as float, and a thread multiplies
// them with one key row after another. K is read m / 8 times (from the caches, mostly). Formulas in scan.cuh; here a panel is one query head.
#pragma once

#include "cuda/kernels/scan_results.cuh"

namespace laprox::cuda {

enum class ScanMode { kSums, kSample, kRepair };

inline constexpr int kPlainThreads = 128;
inline constexpr int kPlainRows = 8;
inline constexpr int kMaxHeadDim = 256;

template <typename T>
__device__ inline void load_eight(const char* from, float (&x)[8]) {
  constexpr int kVectors = sizeof(T) / 2;
  alignas(16) T elements[8];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) reinterpret_cast<uint4*>(elements)[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float(elements[i]);
}

__device__ inline float load_element(lpx_dtype dtype, const char* row, int k) {
  if (dtype == LPX_F32) return reinterpret_cast<const float*>(row)[k];
  if (dtype == LPX_F16) return to_float(reinterpret_cast<const __half*>(row)[k]);
  return to_float(reinterpret_cast<const __nv_bfloat16*>(row)[k]);
}

// Sum over the block's threads, in a fixed order; every thread gets it.
__device__ inline float block_sum(float x, float (&scratch)[kPlainThreads / 32]) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (float part : scratch) total += part;
  return total;
}
__device__ inline float block_max(float x, float (&scratch)[kPlainThreads / 32]) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float most = -INFINITY;
  for (float part : scratch) most = fmaxf(most, part);
  return most;
}

// Of a sample the piece is but its segment.
template <typename T, ScanMode Mode>
__device__ inline void scan_plain_piece(const ScanView& v, lpx_dtype window, const Piece& piece, int head,
                                        float (&queries)[kPlainRows][kMaxHeadDim]) {
  __shared__ float scratch[kPlainThreads / 32];
  const Geometry& g = v.g;
  const int segment = piece.segment;
  const int sequence = g.sequence_of(segment);
  const int kv_head = g.head_of(segment);
  const LayerView& layer = g.layer[g.layer_of(segment)];
  Range range;
  int first = 0;
  int end = 0;
  if constexpr (Mode == ScanMode::kSample) {
    if (!prepare_segment(v, layer, segment, head, range)) return;
    end = sample_size(range.end - range.begin);
  } else {
    if (Mode == ScanMode::kRepair && layer.lse != nullptr) return;
    first = piece.first;
    end = min(first + piece.tiles * kScanTile, g.lengths[segment]);
  }
  const int sampled = end;
  const Rows keys(layer, layer.key, sequence, kv_head);
  float* references = v.references + int64_t{segment} * v.padded_rows + head * v.head_rows;
  for (int q0 = 0; q0 < v.head_rows; q0 += kPlainRows) {
    __syncthreads();
    for (int i = threadIdx.x; i < kPlainRows * g.head_dim; i += kPlainThreads) {
      const int q = q0 + i / g.head_dim;
      const int k = i % g.head_dim;
      queries[i / g.head_dim][k] =
          row_exists(v, segment, {head, q}) ? load_element(window, query_row(g, layer, sequence, kv_head, head, q), k) : 0.0f;
    }
    __syncthreads();
    float sums[kPlainRows] = {};
    OnlineSum online[kPlainRows];
    for (int i = first + static_cast<int>(threadIdx.x); i < end; i += kPlainThreads) {
      const int token = Mode == ScanMode::kSample ? sample_token(range, sampled, i) : i;
      const int position = token_position(layer, sequence, kv_head, token);
      const char* row = keys(token);
      float products[kPlainRows] = {};
      for (int k = 0; k < g.head_dim; k += 8) {
        float x[8];
        load_eight<T>(row + k * sizeof(T), x);
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r)
#pragma unroll
          for (int j = 0; j < 8; ++j) products[r] = fmaf(queries[r][k + j], x[j], products[r]);
      }
      float squares = 0;
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r) {
        const bool seen = row_exists(v, segment, {head, q0 + r}) && sees(layer, g.row_position(segment, q0 + r), position);
        const float logit = logit2(layer, products[r]);
        if constexpr (Mode == ScanMode::kSums) {
          const float e = seen ? exp2_fast(logit - references[q0 + r]) : 0.0f;
          sums[r] += e;
          squares = fmaf(e, e, squares);
        } else {
          const float x[1] = {seen ? logit : -INFINITY};
          online[r].add(x);
        }
      }
      if constexpr (Mode == ScanMode::kSums) {
        if (v.roots != nullptr) {  // sums that are not complete yet are rounded up, too
          __nv_bfloat16* at = v.roots + (int64_t{segment} * g.group + head) * g.stride + token;
          const float before = q0 == 0 ? 0.0f : to_float(*at);
          *at = root_of_squares(fmaf(before, before, squares));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      if constexpr (Mode == ScanMode::kSums) {
        const float total = block_sum(sums[r], scratch);
        if (threadIdx.x == 0) v.partials[piece.index * v.padded_rows + head * v.head_rows + q0 + r] = total;
      } else {
        const float most = block_max(online[r].largest, scratch);
        const float base = most == -INFINITY ? 0.0f : most;
        const float log_sum = most + log2f(block_sum(online[r].sum * exp2_fast(online[r].largest - base), scratch));
        if (threadIdx.x != 0) continue;
        if constexpr (Mode == ScanMode::kSample)
          references[q0 + r] = log_sum == -INFINITY ? INFINITY : log_sum;  // sees nothing: no attention at all
        else
          v.partials[piece.index * v.padded_rows + head * v.head_rows + q0 + r] = log_sum;
      }
    }
  }
}

// A block a (segment, head) of a sample, else a (worker, head). A sample's end numbers the tiles, a repair's finishes it.
template <typename T, ScanMode Mode>
__global__ void __launch_bounds__(kPlainThreads)
    scan_plain(const __grid_constant__ ScanView v, lpx_dtype window, const __grid_constant__ ScanResults to) {
  lead_next();
  __shared__ float queries[kPlainRows][kMaxHeadDim];
  if (failed_together(v.g.status) || (Mode == ScanMode::kRepair && v.outgrown[v.g.segments] == 0)) return;
  const int head = static_cast<int>(blockIdx.x) % v.panels;
  Piece piece{static_cast<int>(blockIdx.x) / v.panels, 0, 0, 0};
  if constexpr (Mode == ScanMode::kSample) {
    scan_plain_piece<T, Mode>(v, window, piece, head, queries);
    if (last_to_arrive(v.g.arrivals + kSampled, gridDim.x)) number_seen_tiles(v);
  } else {
    Pieces pieces(v, static_cast<int>(blockIdx.x) / v.panels);
    while (pieces.next(piece))
      if (Mode == ScanMode::kSums || v.outgrown[piece.segment] != 0) scan_plain_piece<T, Mode>(v, window, piece, head, queries);
    if constexpr (Mode == ScanMode::kRepair) finish_repair(v, to);
  }
}

}  // namespace laprox::cuda
