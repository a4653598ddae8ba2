// Upper bounds of scores:
//
//   U(g, i) = ||v_i|| * weight * sum over h of s_h * sqrt(inflation_h * squares_h(i))  >=  score(g, i)
//
// s_h bounds the singular values of W_h; squares and inflation come from the scan. Grown by what rounding may take: a part in
// a thousand, and squares of attention that vanish in float.
//
// The lowest bit of a bound says whether it is tight: made from exact attention norms instead of the scan's.
//
// Bytes an entry: 4 R of squares, 4 of a kept norm or a row of V, 4 for U and 4 for the score that is absent as yet.
// Layout: a warp has runs of 128 tokens, a lane four neighbouring ones: 16-byte accesses. Rows of V are summed 16 bytes a lane,
// and the sums sorted to the lanes of their tokens.
#pragma once

#include "cuda/kernels/select_views.cuh"

namespace laprox::cuda {

inline constexpr int kBoundThreads = 256;
inline constexpr int kBoundBlocks = 4;  // a multiprocessor
inline constexpr float kBoundMargin = 1.001f;
inline constexpr float kVanishedSquares = 2e-36f;  // of up to 128 rows
inline constexpr float kVanishedBound = 1e-37f;
inline constexpr float kVanishedNorm = 2e-18f;
inline constexpr int kMaxBoundGroup = 64;

struct BoundView {
  Geometry g;
  const int32_t* tile_start;
  const float* squares;    // [segments][R][stride]
  const float* inflation;  // [segments][R]
  const float* singular;   // [layers][query heads]
  int32_t row_bytes;
  float* bounds;  // [segments][stride]
  float* scores;  // [segments][stride]
};

template <typename T>
__device__ inline float sum_of_squares(uint4 piece) {
  float sum = 0;
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      const float x = __uint_as_float(words[i]);
      sum += x * x;
    } else {
      T pair[2];
      memcpy(pair, &words[i], 4);
      const float x = to_float(pair[0]);
      const float y = to_float(pair[1]);
      sum += x * x + y * y;
    }
  }
  return sum;
}

template <int kHalf, int kCount>
__device__ inline void fold(float (&sums)[kCount], int lane) {
  if constexpr (kHalf > 0) {
    const bool upper = (lane & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? sums[kHalf + i] : sums[i];
      const float given = upper ? sums[i] : sums[kHalf + i];
      sums[i] = kept + __shfl_xor_sync(~0u, given, kHalf);
    }
    fold<kHalf / 2>(sums, lane);
  }
}

// The sum of squares of each lane's row, where kLanes lanes read a row at a time (of up to 32 pieces). Each lane first has a
// piece of kLanes rows; an exchange that halves the rows with every step leaves it the whole of its own.
template <typename T, int kLanes>
__device__ inline float sum_of_row(const char* own, int pieces, int lane) {
  float sums[kLanes];
  const int piece = lane % kLanes;
  constexpr int kInFlight = kLanes < 8 ? kLanes : 8;
#pragma unroll
  for (int first = 0; first < kLanes; first += kInFlight) {
    uint4 held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const auto from = reinterpret_cast<const uint4*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(own), lane / kLanes * kLanes + first + i));
      held[i] = {0, 0, 0, 0};
      if (from != nullptr && piece < pieces) held[i] = __ldcs(from + piece);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) sums[first + i] = sum_of_squares<T>(held[i]);
  }
  fold<kLanes / 2>(sums, lane);
  return sums[0];
}

// ||v|| of each lane's row of V; null: none.
template <typename T>
__device__ inline float norm_of_row(const char* own, int row_bytes, int lane) {
  const int pieces = row_bytes / 16;
  if (__all_sync(~0u, reinterpret_cast<uint64_t>(own) % 16 == 0) && pieces <= 32)
    return sqrtf(pieces <= 8    ? sum_of_row<T, 8>(own, pieces, lane)
                 : pieces <= 16 ? sum_of_row<T, 16>(own, pieces, lane)
                                : sum_of_row<T, 32>(own, pieces, lane));
  float sum = 0;
  for (int i = 0; own != nullptr && i < row_bytes / static_cast<int>(sizeof(T)); ++i) {
    const float x = to_float(reinterpret_cast<const T*>(own)[i]);
    sum += x * x;
  }
  return sqrtf(sum);
}

__device__ inline float loose(float bound) {
  const uint32_t bits = __float_as_uint(bound);
  return __uint_as_float(bits + (bits < 0x7f800000u ? bits & 1 : 0));
}
__device__ inline float tight(float bound) {
  const uint32_t bits = __float_as_uint(bound);
  return __uint_as_float(bits + (~bits & 1));
}

__device__ inline float root(float x) {  // to a few units in the last place
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Norms that the cache keeps, of four tokens.
__device__ inline float4 kept_norms(const Rows& rows, int token, int length) {
  float4 norm = {0, 0, 0, 0};
  if (token >= length) return norm;
  const char* first = rows(token);
  const bool together = rows.token_stride == 4 && (rows.table == nullptr || rows.page_size % 4 == 0) && reinterpret_cast<uint64_t>(first) % 16 == 0;
  if (together && token + 4 <= length) return __ldcs(reinterpret_cast<const float4*>(first));
  norm.x = *reinterpret_cast<const float*>(first);
  if (token + 1 < length) norm.y = *reinterpret_cast<const float*>(rows(token + 1));
  if (token + 2 < length) norm.z = *reinterpret_cast<const float*>(rows(token + 2));
  if (token + 3 < length) norm.w = *reinterpret_cast<const float*>(rows(token + 3));
  return norm;
}

// Of the layers whose cache keeps norms, or of the others; T is the type of V's elements.
template <typename T, bool kKept>
__global__ void __launch_bounds__(kBoundThreads, kKept ? kBoundBlocks : 3) find_bounds(const __grid_constant__ BoundView b) {
  if (*b.g.status != LPX_OK) return;
  __shared__ float factors[kBoundThreads / 32][kMaxBoundGroup];
  const Geometry& g = b.g;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int tiles = b.tile_start[g.segments];
  const int begin_tile = static_cast<int>(int64_t{tiles} * blockIdx.x / gridDim.x);
  const int end_tile = static_cast<int>(int64_t{tiles} * (blockIdx.x + 1) / gridDim.x);
  if (begin_tile >= end_tile) return;
  int segment = segment_of_tile(b.tile_start, g.segments, begin_tile);
  int known = -1;  // the segment of `factor`
  float* factor = factors[warp];
  for (int tile = begin_tile + warp; tile < end_tile; tile += kBoundThreads / 32) {
    while (b.tile_start[segment + 1] <= tile) ++segment;
    const int length = g.lengths[segment];
    const int begin = (tile - b.tile_start[segment]) * kTile;
    const int head = g.head_of(segment);
    const int layer_index = g.layer_of(segment);
    const LayerView& layer = g.layer[layer_index];
    if ((layer.value_norm.data != nullptr) != kKept) continue;
    if (known != segment) {
      __syncwarp();
      for (int h = lane; h < g.group; h += 32)
        factor[h] =
            b.singular[(int64_t{layer_index} * g.kv_heads + head) * g.group + h] * layer.weight * sqrtf(b.inflation[int64_t{segment} * g.group + h]);
      __syncwarp();
      known = segment;
    }
    const Rows rows(layer, kKept ? layer.value_norm : layer.value, g.sequence_of(segment), head);
    const int end = min(begin + kTile, length);
#pragma unroll 1
    for (int token = begin + lane * 4; token - lane * 4 < end; token += kRun) {
      float4 norm = {0, 0, 0, 0};
      if constexpr (kKept) {
        norm = kept_norms(rows, token, length);
      } else {
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
          const float next = norm_of_row<T>(token + i < length ? rows(token + i) : nullptr, b.row_bytes, lane);
          norm = {norm.y, norm.z, norm.w, next};
        }
      }
      if (token >= length) continue;
      float4 sum = {0, 0, 0, 0};
      const float* squares = b.squares + int64_t{segment} * g.group * g.stride + token;  // slots up to the stride, a multiple of 4
#pragma unroll 4
      for (int h = 0; h < g.group; ++h) {
        const float4 square = __ldcs(reinterpret_cast<const float4*>(squares + h * g.stride));
        sum.x += factor[h] * root(square.x + kVanishedSquares);
        sum.y += factor[h] * root(square.y + kVanishedSquares);
        sum.z += factor[h] * root(square.z + kVanishedSquares);
        sum.w += factor[h] * root(square.w + kVanishedSquares);
      }
      const int64_t at = segment * g.stride + token;
      *reinterpret_cast<float4*>(b.bounds + at) = {
          loose(norm.x * sum.x * kBoundMargin + kVanishedBound), loose(norm.y * sum.y * kBoundMargin + kVanishedBound),
          loose(norm.z * sum.z * kBoundMargin + kVanishedBound), loose(norm.w * sum.w * kBoundMargin + kVanishedBound)};
      *reinterpret_cast<float4*>(b.scores + at) = {absent_score(), absent_score(), absent_score(), absent_score()};
    }
  }
}

// Tightens the bounds of listed tokens, whose `scores` hold weight * sum over h of ||a_h||, and makes these absent again.
template <typename T>
__global__ void __launch_bounds__(kBoundThreads) tighten_bounds(const __grid_constant__ BoundView b, const int32_t* tokens, const int32_t* counts) {
  if (*b.g.status != LPX_OK) return;
  const Geometry& g = b.g;
  const int lane = threadIdx.x % 32;
  for (int segment = blockIdx.y; segment < g.segments; segment += gridDim.y) {
    const int count = counts[segment];
    if (count == 0) continue;
    const int head = g.head_of(segment);
    const int layer_index = g.layer_of(segment);
    const LayerView& layer = g.layer[layer_index];
    float singular = 0;
    for (int h = 0; h < g.group; ++h) singular = fmaxf(singular, b.singular[(int64_t{layer_index} * g.kv_heads + head) * g.group + h]);
    const float vanished = kVanishedNorm * g.group * layer.weight;
    const bool kept = layer.value_norm.data != nullptr;
    const Rows rows(layer, kept ? layer.value_norm : layer.value, g.sequence_of(segment), head);
    const int length = g.lengths[segment];
    for (int first = (blockIdx.x * kBoundThreads + threadIdx.x) / 32 * 32; first < count; first += gridDim.x * kBoundThreads) {
      const int token = first + lane < count ? tokens[segment * g.stride + first + lane] : length;
      float norm = 0;
      if (!kept)
        norm = norm_of_row<T>(token < length ? rows(token) : nullptr, b.row_bytes, lane);
      else if (token < length)
        norm = *reinterpret_cast<const float*>(rows(token));
      if (token >= length) continue;
      const int64_t at = segment * g.stride + token;
      const float own = b.bounds[at];
      const float exact = norm * singular * (b.scores[at] + vanished) * kBoundMargin + kVanishedBound;
      b.bounds[at] = tight(exact < own ? exact : own);
      b.scores[at] = absent_score();
    }
  }
}

}  // namespace laprox::cuda
