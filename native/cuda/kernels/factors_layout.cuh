// How the factor of one (layer, KV head) lies in memory.
//
// With the slices W_1 .. W_R of a KV head stacked, W W^T = L L^T; row h of blocks of L (d x d each) gives u_h = v L_h, block
// (h, j) is zero for j > h, and block (h, h) is lower triangular: feature k of v meets column c of it only where c <= k.
//
// plain   [R * (R + 1) / 2 blocks][k: d][c: d] float; block (h, j) is number h * (h + 1) / 2 + j.
// image   for tensor cores: chunks in the order the kernels stream them, each the very bytes of a shared-memory tile.
//         A chunk is `columns` factor columns of block column j, for all R - j heads: rows of d features (the feature runs
//         fastest, so that a chunk is the K-major right operand), heads j + 1 .. R - 1 first and head j, whose leading
//         features are zero, last: its zeros are a suffix of the rows and cost nothing. Features lie in panels of 64, each
//         [rows][64] 16-bit elements, 16-byte pieces XORed with the row mod 8 (the 128-byte swizzle of wgmma, and free of
//         bank conflicts for ldmatrix). The image is divided by a power of two (`scale`), which keeps f16 in range.
#pragma once

#include <cstdint>

namespace laprox::cuda {

inline constexpr int kMaxFastGroup = 8;

#define LPX_BOTH __host__ __device__

// Rows of a chunk, at most: 32 KiB.
LPX_BOTH constexpr int chunk_rows(int head_dim) { return head_dim <= 128 ? 128 : 64; }
// Factor columns of a chunk in block column j, where `heads` = R - j heads take part.
LPX_BOTH constexpr int chunk_columns(int heads, int head_dim) {
  const int least = head_dim <= 128 ? 16 : 8;
  for (int columns = head_dim; columns > least; columns -= least)
    if (head_dim % columns == 0 && heads * columns <= chunk_rows(head_dim)) return columns;
  return least;
}
LPX_BOTH constexpr int feature_panels(int head_dim) { return (head_dim + 63) / 64; }
LPX_BOTH constexpr int chunk_bytes(int rows, int head_dim) { return rows * feature_panels(head_dim) * 128; }
LPX_BOTH constexpr int block_column_bytes(int heads, int head_dim) { return heads * head_dim * feature_panels(head_dim) * 128; }
// Of one (layer, KV head).
LPX_BOTH constexpr int64_t image_bytes(int group, int head_dim) {
  return int64_t{group} * (group + 1) / 2 * head_dim * feature_panels(head_dim) * 128;
}
LPX_BOTH constexpr int64_t plain_floats(int group, int head_dim) { return int64_t{group} * (group + 1) / 2 * head_dim * head_dim; }
LPX_BOTH constexpr bool has_image(int group, int head_dim) { return group <= kMaxFastGroup && head_dim % 16 == 0 && head_dim >= 64; }

// Offset in bytes of (row, feature) in a swizzled tile of `rows` rows.
LPX_BOTH constexpr int swizzled(int rows, int row, int feature) {
  return feature / 64 * rows * 128 + row * 128 + ((feature % 64 / 8) ^ (row % 8)) * 16 + feature % 8 * 2;
}

// What kernels see of the factors of a model.
struct FactorView {
  const int32_t* slots;  // [layers]: the layer's place among those with a projection, or -1
  const float* plain;    // [slots * kv_heads][plain_floats]
  const char* image;     // [slots * kv_heads][image_bytes]; null: none
  const float* scales;   // [slots * kv_heads]: what the image has to be multiplied by
  int64_t plain_floats;
  int64_t image_bytes;
};

}  // namespace laprox::cuda
