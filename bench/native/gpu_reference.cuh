// Plain kernels of the benchmark itself: they fill the inputs, and they say from definitions alone what the library's answers are
// held against. Logits come from the tensor cores (bfloat16 in, float32 sums); everything after them is float32.
#pragma once

#include <mma.h>

#include "gpu_data.cuh"

namespace bench {

using bf16 = __nv_bfloat16;

constexpr int kRows = 32;      // m of every configuration
constexpr int kHeadDim = 128;  // d of every configuration
constexpr int kTile = 16;      // tokens a warp computes logits of at a time; tokens of a cache are a multiple of 8 tiles
constexpr int kPitch = kTile + 4;
constexpr float kLog2E = 1.44269504088896340736f;

// ---------------------------------------------------------------- inputs

// to[2 * i], to[2 * i + 1] = f(i) for all i < pairs.
template <typename F>
__global__ void fill_pairs(bf16* to, int64_t pairs, F f) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < pairs; i += int64_t{gridDim.x} * blockDim.x) {
    const float2 both = f(i);
    reinterpret_cast<__nv_bfloat162*>(to)[i] = __floats2bfloat162_rn(both.x, both.y);
  }
}

// grid (pieces / (blockDim / features), segments)
__global__ void fill_features(Generator g, bf16* keys) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int f = thread % Generator::kFeatures;
  const int segment = blockIdx.y;
  bf16* to = keys + int64_t{segment} * g.shape.tokens * g.shape.head_dim + f;
  g.features(segment, f, thread / Generator::kFeatures, [&](int token, float x) { to[int64_t{token} * g.shape.head_dim] = __float2bfloat16(x); });
}

struct Inputs {
  bf16* keys;
  bf16* values;
  bf16* queries;
};

inline void fill_projections(const Generator& g, bf16* projections, cudaStream_t stream) {
  const int width = g.shape.query_heads * g.shape.head_dim;
  const int columns = g.shape.model_dim;
  fill_pairs<<<4096, 256, 0, stream>>>(projections, g.shape.projection_elements() / 2, [=] __device__(int64_t i) {
    const int64_t row = 2 * i / width;
    return g.weight(static_cast<int>(row / columns), static_cast<int>(row % columns), static_cast<int>(2 * i % width));
  });
}

inline void fill_inputs(const Generator& g, const Inputs& to, cudaStream_t stream) {
  const int64_t head = int64_t{g.shape.tokens} * g.shape.head_dim;
  const int dim = g.shape.head_dim;
  const int rows = g.shape.rows;
  fill_pairs<<<8192, 256, 0, stream>>>(to.keys, g.shape.cache_elements() / 2, [=] __device__(int64_t i) {
    return g.key(static_cast<int>(2 * i / head), static_cast<int>(2 * i % head / dim), static_cast<int>(2 * i % dim));
  });
  fill_pairs<<<8192, 256, 0, stream>>>(to.values, g.shape.cache_elements() / 2, [=] __device__(int64_t i) {
    return g.value(static_cast<int>(2 * i / head), static_cast<int>(2 * i % head / dim), static_cast<int>(2 * i % dim));
  });
  fill_pairs<<<1024, 256, 0, stream>>>(to.queries, g.shape.query_elements() / 2, [=] __device__(int64_t i) {
    const int row = static_cast<int>(2 * i / dim);
    const int at = static_cast<int>(2 * i % dim);
    return float2{g.query(row / rows, row % rows, at), g.query(row / rows, row % rows, at + 1)};
  });
  if (g.input == Input::kDiffuse) return;
  constexpr int kPieces = 8;  // a block
  const int pieces = (g.shape.tokens + Generator::kPiece - 1) / Generator::kPiece;
  fill_features<<<dim3((pieces + kPieces - 1) / kPieces, g.shape.segments()), kPieces * Generator::kFeatures, 0, stream>>>(g, to.keys);
}

// ---------------------------------------------------------------- attention

// logits[row * kPitch + t] = q[row] . k[t] of 32 rows and 16 tokens, by one warp.
__device__ inline void multiply(const bf16* queries, const bf16* keys, float* logits) {
  using namespace nvcuda::wmma;
  fragment<accumulator, 16, 16, 16, float> sums[2];
  fill_fragment(sums[0], 0.0f);
  fill_fragment(sums[1], 0.0f);
  for (int k = 0; k < kHeadDim; k += 16) {
    fragment<matrix_b, 16, 16, 16, bf16, col_major> b;
    load_matrix_sync(b, keys + k, kHeadDim);
    for (int half = 0; half < 2; half++) {
      fragment<matrix_a, 16, 16, 16, bf16, row_major> a;
      load_matrix_sync(a, queries + half * 16 * kHeadDim + k, kHeadDim);
      mma_sync(sums[half], a, b, sums[half]);
    }
  }
  for (int half = 0; half < 2; half++) store_matrix_sync(logits + half * 16 * kPitch, sums[half], kPitch, mem_row_major);
  __syncwarp();
}

struct Partial {
  float max;  // of logits in base 2
  float sum;  // of exp2(logit - max)
};

__device__ inline Partial join(Partial a, Partial b) {
  const float max = fmaxf(a.max, b.max);
  if (max == -INFINITY) return {max, 0};
  return {max, a.sum * exp2f(a.max - max) + b.sum * exp2f(b.max - max)};
}

// partials [query heads of all layers, splits, rows]. grid (splits, query heads)
__global__ void __launch_bounds__(256) partial_sums(Shape s, const bf16* queries, const bf16* keys, int split, Partial* partials) {
  __shared__ alignas(32) bf16 q[kRows * kHeadDim];
  __shared__ alignas(32) float logits[8][kRows * kPitch];
  __shared__ Partial parts[8][kRows];
  const int head = blockIdx.y;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < kRows * kHeadDim; i += 256) q[i] = queries[int64_t{head} * kRows * kHeadDim + i];
  __syncthreads();
  const bf16* k = keys + int64_t{head / s.group()} * s.tokens * kHeadDim;
  const int end = min(s.tokens, static_cast<int>(blockIdx.x + 1) * split);
  const float scale = kLog2E * rsqrtf(static_cast<float>(kHeadDim));
  const int last = s.tokens - kRows + lane;  // that the row sees
  Partial sum{-INFINITY, 0};
  for (int token = blockIdx.x * split + warp * kTile; token < end; token += 8 * kTile) {
    multiply(q, k + int64_t{token} * kHeadDim, logits[warp]);
    const float* row = logits[warp] + lane * kPitch;
    Partial tile{-INFINITY, 0};
    for (int t = 0; t < kTile; t++)
      if (token + t <= last) tile.max = fmaxf(tile.max, row[t] * scale);
    for (int t = 0; t < kTile; t++)
      if (token + t <= last) tile.sum += exp2f(row[t] * scale - tile.max);
    sum = join(sum, tile);
    __syncwarp();
  }
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp != 0) return;
  for (int other = 1; other < 8; other++) sum = join(sum, parts[other][lane]);
  partials[(int64_t{head} * gridDim.x + blockIdx.x) * kRows + lane] = sum;
}

// lse [query heads of all layers, rows], natural logarithms.
__global__ void join_sums(const Partial* partials, int splits, float* lse) {
  Partial sum{-INFINITY, 0};
  for (int i = 0; i < splits; i++) sum = join(sum, partials[(int64_t{blockIdx.x} * splits + i) * kRows + threadIdx.x]);
  lse[blockIdx.x * kRows + threadIdx.x] = (sum.max + log2f(sum.sum)) / kLog2E;
}

// bounds[segment, token] = ||v|| * sum over the group of s_h ||a_h||. grid (tokens / 128, segments)
__global__ void __launch_bounds__(256)
    exact_bounds(Shape s, const bf16* queries, const bf16* keys, const bf16* values, const float* lse, const float* singular, float* bounds) {
  __shared__ alignas(32) bf16 q[kRows * kHeadDim];
  __shared__ alignas(32) float logits[8][kRows * kPitch];
  __shared__ float row_lse[kRows];
  const int segment = blockIdx.y;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first = blockIdx.x * 8 * kTile + warp * kTile;
  const int64_t row = int64_t{segment} * s.tokens + first;
  const int t = lane % kTile;
  const float scale = kLog2E * rsqrtf(static_cast<float>(kHeadDim));
  float bound = 0;
  for (int h = 0; h < s.group(); h++) {
    const int head = segment * s.group() + h;
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kHeadDim; i += 256) q[i] = queries[int64_t{head} * kRows * kHeadDim + i];
    if (threadIdx.x < kRows) row_lse[threadIdx.x] = lse[head * kRows + threadIdx.x] * kLog2E;
    __syncthreads();
    multiply(q, keys + row * kHeadDim, logits[warp]);
    float sum = 0;
    for (int r = lane / kTile; r < kRows; r += 2)
      if (first + t <= s.tokens - kRows + r) sum += exp2f(2 * (logits[warp][r * kPitch + t] * scale - row_lse[r]));
    sum += __shfl_xor_sync(~0u, sum, 16);
    bound += singular[head] * sqrtf(sum);
  }
  float norm = 0;
  for (int i = 0; i < kTile; i++) {
    float sum = 0;
    for (int j = lane; j < kHeadDim; j += 32) {
      const float v = __bfloat162float(values[(row + i) * kHeadDim + j]);
      sum += v * v;
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (i == t) norm = sqrtf(sum);
  }
  if (lane < kTile) bounds[row + t] = bound * norm;
}

// The largest singular value of each W_h by power iteration. One block a query head of a layer, blockDim = 256.
__global__ void largest_singular(Shape s, const bf16* projections, float* singular) {
  __shared__ float x[kHeadDim];
  __shared__ float next[8][kHeadDim];
  const int layer = blockIdx.x / s.query_heads;
  const int64_t width = int64_t{s.query_heads} * kHeadDim;
  const bf16* w = projections + int64_t{layer} * s.model_dim * width + blockIdx.x % s.query_heads * kHeadDim;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < kHeadDim) x[threadIdx.x] = 1 / sqrtf(static_cast<float>(kHeadDim));
  float length = 0;
  for (int step = 0; step < 12; step++) {
    __syncthreads();
    float sums[4] = {};
    for (int c = warp; c < s.model_dim; c += 8) {
      float element[4];
      float y = 0;
      for (int j = 0; j < 4; j++) {
        element[j] = __bfloat162float(w[c * width + j * 32 + lane]);
        y += element[j] * x[j * 32 + lane];
      }
      for (int shift = 16; shift > 0; shift /= 2) y += __shfl_xor_sync(~0u, y, shift);
      for (int j = 0; j < 4; j++) sums[j] += y * element[j];
    }
    for (int j = 0; j < 4; j++) next[warp][j * 32 + lane] = sums[j];
    __syncthreads();
    if (threadIdx.x < kHeadDim)
      for (int other = 1; other < 8; other++) next[0][threadIdx.x] += next[other][threadIdx.x];
    __syncthreads();
    length = 0;
    for (int i = 0; i < kHeadDim; i++) length += next[0][i] * next[0][i];
    length = sqrtf(length);
    if (threadIdx.x < kHeadDim) x[threadIdx.x] = next[0][threadIdx.x] / length;
  }
  if (threadIdx.x == 0) singular[blockIdx.x] = sqrtf(length);
}

// ---------------------------------------------------------------- answers

// The smallest pooled score that was kept on its merit, as bits of a float that is not negative. One block a segment.
__global__ void smallest_kept(Shape s, const float* scores, int reach, int sinks, int recent, const int32_t* tokens, const int64_t* offsets,
                              unsigned* smallest) {
  const float* of = scores + int64_t{blockIdx.x} * s.tokens;
  for (int64_t e = offsets[blockIdx.x] + threadIdx.x; e < offsets[blockIdx.x + 1]; e += blockDim.x) {
    const int token = tokens[e];
    if (token < sinks || token >= s.tokens - recent) continue;
    float pooled = 0;
    for (int t = max(0, token - reach); t <= min(s.tokens - 1, token + reach); t++) pooled = fmaxf(pooled, of[t]);
    atomicMin(smallest, __float_as_uint(pooled));
  }
}

struct Counts {
  unsigned long long above;    // unprotected entries whose bound reaches the threshold
  unsigned long long beyond;   // entries whose score is more than their bound, rounding apart: must be none
  unsigned long long differs;  // of two selections
  unsigned long long moved;    // kept rows that are not in the compacted cache
};

__global__ void count_above(Shape s, const float* bounds, const float* scores, const unsigned* threshold, int sinks, int recent, Counts* counts) {
  unsigned long long above = 0;
  unsigned long long beyond = 0;
  const float least = __uint_as_float(*threshold);
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < s.entries(); i += int64_t{gridDim.x} * blockDim.x) {
    const int token = static_cast<int>(i % s.tokens);
    above += token >= sinks && token < s.tokens - recent && bounds[i] >= least;
    beyond += !(scores[i] <= bounds[i] * 1.01f + 1e-30f);
  }
  if (above != 0) atomicAdd(&counts->above, above);
  if (beyond != 0) atomicAdd(&counts->beyond, beyond);
}

__global__ void count_different(const int32_t* a, const int32_t* b, int64_t kept, const int64_t* offsets_a, const int64_t* offsets_b, int segments,
                                Counts* counts) {
  const int64_t first = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  for (int64_t i = first; i < kept; i += int64_t{gridDim.x} * blockDim.x)
    if (a[i] != b[i]) atomicAdd(&counts->differs, 1);
  for (int64_t i = first; i <= segments; i += int64_t{gridDim.x} * blockDim.x)
    if (offsets_a[i] != offsets_b[i]) atomicAdd(&counts->differs, 1);
}

// One block a segment.
__global__ void count_not_moved(Shape s, const bf16* rows, const bf16* kept_rows, const int32_t* tokens, const int64_t* offsets, Counts* counts) {
  const uint4* from = reinterpret_cast<const uint4*>(rows + int64_t{blockIdx.x} * s.tokens * kHeadDim);
  const uint4* to = reinterpret_cast<const uint4*>(kept_rows);
  constexpr int kParts = kHeadDim / 8;
  const int64_t begin = offsets[blockIdx.x] * kParts;
  const int64_t end = offsets[blockIdx.x + 1] * kParts;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const uint4 a = from[int64_t{tokens[i / kParts]} * kParts + i % kParts];
    const uint4 b = to[i];
    if (a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w) atomicAdd(&counts->moved, 1);
  }
}

}  // namespace bench
