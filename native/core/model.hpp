// The attention side of a language model: shapes, per-layer attention parameters, output projections.
#pragma once

#include <memory>
#include <vector>

#include "core/geometry.hpp"
#include "laprox/laprox.h"

namespace laprox {

// W_O of one layer where the caller keeps it: row h * head_dim + i, column c.
struct Projection {
  const std::byte* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;

  explicit operator bool() const { return data != nullptr; }
  const std::byte* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

struct Layer {
  Projection projection;
  float scale = 0;
  float soft_cap = 0;
  int32_t sliding_window = 0;
  std::vector<float> sink_logits;  // [query_heads] or empty
};

struct ModelShape {
  explicit ModelShape(const lpx_model_desc* desc);

  int query_heads = 0;
  int kv_heads = 0;
  int group = 0;  // query heads that share a KV head
  int head_dim = 0;
  int model_dim = 0;
  lpx_dtype projection_dtype = LPX_F32;
  std::vector<Layer> layers;

  // The cache must have this model's layers, heads and head dimension.
  void check(const lpx_cache& cache) const;
};

// Query rows of one (layer, sequence, KV head): row r = h * m + q is window query q of the group's query head h.
class Window {
 public:
  // `ahead`: how many positions its last row lies behind the last token that was read.
  Window(const lpx_window* window, const ModelShape& model, const lpx_cache& cache, int32_t ahead = 0);

  int rows() const { return desc_->rows; }
  int32_t ahead() const { return ahead_; }
  lpx_dtype dtype() const { return desc_->dtype; }
  const std::byte* query(Segment s, int group_head, int row) const;
  bool has_lse(int layer) const { return desc_->layer[layer].lse != nullptr; }
  // In base 2, whatever the caller's base.
  double log2_sum(Segment s, int group_head, int row) const;

 private:
  const lpx_window* desc_;
  int group_;
  int32_t ahead_;
};

}  // namespace laprox
