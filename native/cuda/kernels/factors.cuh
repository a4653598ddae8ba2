// From output projections to factors, in double, once a model.
//
//   gram      A = X X^T, X the stacked slices of a KV head [R*d x D] (or, for norms, rows of L). 64 x 64 tiles of the lower
//             half, 16 columns of X at a time through shared memory, 4 x 4 sums a thread; the other half is mirrored.
//   cholesky  right-looking in panels of 64 columns: the diagonal block in one CTA, the rows below it, and the rest by the
//             gram kernel with a minus sign. A pivot that is rounding noise of its own row's diagonal makes a zero column.
//   norms     ||A^64||_F^(1/64) is at least the largest eigenvalue of A: six squarings by the gram kernel.
//
// 2 * (R*d)^2 / 2 * D operations a KV head: 0.27 TFLOP for Llama-8B, some tens of milliseconds. Batches of matrices keep
// the double-precision workspace small.
#pragma once

#include "cuda/kernels/factors_layout.cuh"
#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

inline constexpr int kGramTile = 64;
inline constexpr int kGramDepth = 16;
inline constexpr int kGramThreads = 256;
inline constexpr double kRankTolerance = 1e-15;

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float(float x) {
  return x;
}
template <>
__device__ inline __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

// Element (row, k) of the matrix whose gram is wanted, by batch.
template <typename T>
struct WeightSource {
  const char* const* data;  // [batch]: first weight of the slices
  int64_t row_stride;
  int64_t column_stride;
  bool rows_contiguous;  // neighbouring rows are neighbours in memory

  __device__ int depth(int, int all) const { return all; }
  __device__ double at(int batch, int row, int k) const {
    return static_cast<double>(to_float(*reinterpret_cast<const T*>(data[batch] + row * row_stride + k * column_stride)));
  }
};

struct MatrixSource {
  const double* data;
  int64_t batch_stride;
  int64_t row_stride;
  static constexpr bool rows_contiguous = false;

  __device__ int depth(int, int all) const { return all; }
  __device__ double at(int batch, int row, int k) const { return data[batch * batch_stride + row * row_stride + k]; }
};

// Rows of head batch % group of L as kernels read them: rounded to T after division by the scale.
template <typename T>
struct RoundedSource {
  const double* data;  // [matrices][size][size]
  const float* scales;
  int group;
  int head_dim;
  static constexpr bool rows_contiguous = false;

  __device__ int depth(int batch, int) const { return (batch % group + 1) * head_dim; }
  __device__ double at(int batch, int row, int k) const {
    const int64_t size = int64_t{group} * head_dim;
    const int r = batch % group * head_dim + row;
    if (k > r) return 0;
    const float scale = scales[batch / group];
    return static_cast<double>(to_float(from_float<T>(static_cast<float>(data[(batch / group) * size * size + r * size + k]) / scale)) * scale);
  }
};

// out = beta * out + alpha * X X^T for the tile (blockIdx.x of the lower half's tiles) of matrix blockIdx.y.
template <typename Source>
__global__ void __launch_bounds__(kGramThreads)
    gram_kernel(Source source, int size, int depth, double alpha, double beta, double* out, int64_t batch_stride, int64_t row_stride, bool mirrored) {
  follow_previous();
  __shared__ double left[kGramDepth][kGramTile + 1];
  __shared__ double right[kGramDepth][kGramTile + 1];
  int tile_row = 0;
  int tile_column = static_cast<int>(blockIdx.x);
  while (tile_column > tile_row) tile_column -= ++tile_row;
  const int batch = static_cast<int>(blockIdx.y);
  const int row0 = tile_row * kGramTile;
  const int column0 = tile_column * kGramTile;
  const int tx = static_cast<int>(threadIdx.x) % 16;
  const int ty = static_cast<int>(threadIdx.x) / 16;
  const int end = source.depth(batch, depth);
  double sums[4][4] = {};
  for (int k0 = 0; k0 < end; k0 += kGramDepth) {
    for (int i = static_cast<int>(threadIdx.x); i < kGramTile * kGramDepth; i += kGramThreads) {
      const int row = source.rows_contiguous ? i % kGramTile : i / kGramDepth;
      const int k = source.rows_contiguous ? i / kGramTile : i % kGramDepth;
      left[k][row] = row0 + row < size && k0 + k < end ? source.at(batch, row0 + row, k0 + k) : 0.0;
      right[k][row] = column0 + row < size && k0 + k < end ? source.at(batch, column0 + row, k0 + k) : 0.0;
    }
    __syncthreads();
    for (int k = 0; k < kGramDepth; ++k) {
      double a[4];
      double b[4];
      for (int i = 0; i < 4; ++i) a[i] = left[k][ty + 16 * i];
      for (int j = 0; j < 4; ++j) b[j] = right[k][tx + 16 * j];
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
    }
    __syncthreads();
  }
  double* to = out + batch * batch_stride;
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int row = row0 + ty + 16 * i;
      const int column = column0 + tx + 16 * j;
      if (row >= size || column > row) continue;
      double& at = to[row * row_stride + column];
      const double value = (beta == 0 ? 0 : beta * at) + alpha * sums[i][j];
      at = value;
      if (mirrored && column < row) to[column * row_stride + row] = value;
    }
  }
}

// Keeps the diagonals and finds the first weight row that is not finite: *bad is the least first_row + index of one.
__global__ void diagonal_kernel(const double* matrices, int size, int64_t batch_stride, int64_t first_row, double* diagonals,
                                unsigned long long* bad) {
  follow_previous();
  const int batch = static_cast<int>(blockIdx.x);
  for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) {
    const double value = matrices[batch * batch_stride + int64_t{i} * size + i];
    diagonals[int64_t{batch} * size + i] = value;
    if (!isfinite(value)) atomicMin(bad, static_cast<unsigned long long>(first_row + int64_t{batch} * size + i));
  }
}

// Factors the 64 x 64 block at (first, first) of each matrix.
__global__ void __launch_bounds__(256) cholesky_diagonal_kernel(double* matrices, int size, int first, const double* diagonals) {
  follow_previous();
  __shared__ double block[kGramTile][kGramTile + 1];
  double* matrix = matrices + blockIdx.x * int64_t{size} * size;
  const int width = min(kGramTile, size - first);
  for (int i = static_cast<int>(threadIdx.x); i < width * width; i += 256)
    block[i / width][i % width] = matrix[int64_t{first + i / width} * size + first + i % width];
  __syncthreads();
  for (int k = 0; k < width; ++k) {
    const double pivot = block[k][k];
    const double root = pivot > kRankTolerance * diagonals[blockIdx.x * int64_t{size} + first + k] ? sqrt(pivot) : 0.0;
    __syncthreads();
    for (int i = k + static_cast<int>(threadIdx.x); i < width; i += 256) block[i][k] = i == k ? root : root == 0 ? 0.0 : block[i][k] / root;
    __syncthreads();
    if (root != 0)
      for (int i = static_cast<int>(threadIdx.x); i < width * width; i += 256) {
        const int row = i / width;
        const int column = i % width;
        if (column > k && column <= row) block[row][column] -= block[row][k] * block[column][k];
      }
    __syncthreads();
  }
  for (int i = static_cast<int>(threadIdx.x); i < width * width; i += 256)
    if (i % width <= i / width) matrix[int64_t{first + i / width} * size + first + i % width] = block[i / width][i % width];
}

// The rows below a factored block: X L^T = A, a row a thread.
__global__ void __launch_bounds__(kGramTile) cholesky_rows_kernel(double* matrices, int size, int first) {
  follow_previous();
  extern __shared__ double cholesky_shared[];
  double* block = cholesky_shared;                               // [64][65]
  double* rows = cholesky_shared + kGramTile * (kGramTile + 1);  // [64][65]
  double* matrix = matrices + blockIdx.y * int64_t{size} * size;
  const int width = min(kGramTile, size - first);
  const int row0 = first + width + static_cast<int>(blockIdx.x) * kGramTile;
  const int count = min(kGramTile, size - row0);
  for (int i = 0; i < width; ++i) {
    if (static_cast<int>(threadIdx.x) < width) block[i * (kGramTile + 1) + threadIdx.x] = matrix[int64_t{first + i} * size + first + threadIdx.x];
  }
  for (int i = 0; i < count; ++i)
    if (static_cast<int>(threadIdx.x) < width) rows[i * (kGramTile + 1) + threadIdx.x] = matrix[int64_t{row0 + i} * size + first + threadIdx.x];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) {
    double* row = rows + threadIdx.x * (kGramTile + 1);
    for (int c = 0; c < width; ++c) {
      double value = row[c];
      for (int k = 0; k < c; ++k) value -= row[k] * block[c * (kGramTile + 1) + k];
      const double pivot = block[c * (kGramTile + 1) + c];
      row[c] = pivot == 0 ? 0.0 : value / pivot;
    }
  }
  __syncthreads();
  for (int i = 0; i < count; ++i)
    if (static_cast<int>(threadIdx.x) < width) matrix[int64_t{row0 + i} * size + first + threadIdx.x] = rows[i * (kGramTile + 1) + threadIdx.x];
}

// Copies the d x d diagonal blocks of the heads: [matrices * group][d][d].
__global__ void head_blocks_kernel(const double* matrices, int group, int head_dim, double* out) {
  follow_previous();
  const int64_t size = int64_t{group} * head_dim;
  const double* from = matrices + (blockIdx.x / group) * size * size + (blockIdx.x % group) * head_dim * (size + 1);
  double* to = out + blockIdx.x * int64_t{head_dim} * head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < head_dim * head_dim; i += static_cast<int>(blockDim.x))
    to[i] = from[(i / head_dim) * size + i % head_dim];
}

// One step of the power's norm: log_scales += log(norm), matrix /= norm, log_scales *= 2; after the last step the bound.
__global__ void __launch_bounds__(256) norm_kernel(double* matrices, int elements, double* log_scales, int step, int steps, float* singular) {
  follow_previous();
  __shared__ double partial[256];
  double* matrix = matrices + blockIdx.x * int64_t{elements};
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < elements; i += 256) sum += matrix[i] * matrix[i];
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int width = 128; width > 0; width /= 2) {
    if (static_cast<int>(threadIdx.x) < width) partial[threadIdx.x] += partial[threadIdx.x + width];
    __syncthreads();
  }
  const double norm = sqrt(partial[0]);
  if (norm > 0)
    for (int i = static_cast<int>(threadIdx.x); i < elements; i += 256) matrix[i] /= norm;
  if (threadIdx.x != 0) return;
  double log_scale = step == 0 ? 0.0 : log_scales[blockIdx.x];
  log_scale = norm > 0 ? log_scale + log(norm) : -INFINITY;
  if (step == steps) {
    // The rounding of the plain copy and of the sum's last digits is inside the margin.
    const auto bound = static_cast<float>(exp(0.5 * log_scale / (1 << steps)) * (1 + 3e-6));
    if (!(bound <= singular[blockIdx.x])) singular[blockIdx.x] = bound;
  }
  log_scales[blockIdx.x] = 2 * log_scale;
}

// The power of two that brings the largest element of L into [1/2, 1].
__global__ void __launch_bounds__(256) scale_kernel(const double* matrices, int size, float* scales) {
  follow_previous();
  __shared__ float partial[256];
  const double* matrix = matrices + blockIdx.x * int64_t{size} * size;
  float largest = 0;
  for (int64_t i = threadIdx.x; i < int64_t{size} * size; i += 256)
    if (i % size <= i / size) largest = fmaxf(largest, fabsf(static_cast<float>(matrix[i])));
  partial[threadIdx.x] = largest;
  __syncthreads();
  for (int width = 128; width > 0; width /= 2) {
    if (static_cast<int>(threadIdx.x) < width) partial[threadIdx.x] = fmaxf(partial[threadIdx.x], partial[threadIdx.x + width]);
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  int exponent = 0;
  if (partial[0] > 0) frexpf(partial[0], &exponent);
  scales[blockIdx.x] = ldexpf(1.0f, max(-100, min(100, exponent)));
}

__global__ void plain_kernel(const double* matrices, int group, int head_dim, float* plain, int64_t floats) {
  follow_previous();
  const int64_t size = int64_t{group} * head_dim;
  const double* matrix = matrices + blockIdx.y * size * size;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < floats; i += int64_t{gridDim.x} * blockDim.x) {
    int j = static_cast<int>(i / (head_dim * head_dim));
    int h = 0;
    while (j > h) j -= ++h;
    const int k = static_cast<int>(i / head_dim % head_dim);
    const int c = static_cast<int>(i % head_dim);
    const int64_t row = int64_t{h} * head_dim + k;
    const int64_t column = int64_t{j} * head_dim + c;
    plain[blockIdx.y * floats + i] = column <= row ? static_cast<float>(matrix[row * size + column]) : 0.0f;
  }
}

// blockIdx.x = block column j, blockIdx.y = matrix.
template <typename T>
__global__ void image_kernel(const double* matrices, int group, int head_dim, const float* scales, char* image, int64_t bytes) {
  follow_previous();
  const int64_t size = int64_t{group} * head_dim;
  const double* matrix = matrices + blockIdx.y * size * size;
  char* to = image + blockIdx.y * bytes;
  const int j = static_cast<int>(blockIdx.x);
  for (int h = 0; h < j; ++h) to += block_column_bytes(group - h, head_dim);
  const int heads = group - j;
  const int columns = chunk_columns(heads, head_dim);
  const int rows = heads * columns;
  const int features = feature_panels(head_dim) * 64;
  const float scale = scales[blockIdx.y];
  for (int i = static_cast<int>(threadIdx.x); i < heads * head_dim * features; i += static_cast<int>(blockDim.x)) {
    const int k = i % features;
    const int row = i / features % rows;
    const int chunk = i / features / rows;
    const int h = row / columns == heads - 1 ? j : j + 1 + row / columns;
    const int64_t column = int64_t{j} * head_dim + chunk * columns + row % columns;
    const int64_t at = int64_t{h} * head_dim + k;
    const float value = k < head_dim && column <= at ? static_cast<float>(matrix[at * size + column]) / scale : 0.0f;
    *reinterpret_cast<T*>(to + int64_t{chunk} * chunk_bytes(rows, head_dim) + swizzled(rows, row, k)) = from_float<T>(value);
  }
}

}  // namespace laprox::cuda
