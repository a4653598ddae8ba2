// What the CPU backend derives from output projections, once a model.
//
// For one (layer, KV head) the slices W_1 .. W_R (each d x D) are stacked to [R*d x D]. Their Gram matrix is L L^T with L
// lower triangular, so that with u_h = v L_h (L_h the rows of head h) the products of projected values are
//   (v W_h)(v W_h')^T = <u_h, u_h'>
// at a width of at most R*d instead of D. In blocks of d columns, L_h is zero right of block h: those blocks are skipped.
//
// The same products are quadratic forms of v, v M_hh' v^T with M_hh' = W_h W_h'^T. They take half of the operations, since a form needs one
// triangle of M_hh' + M_hh'^T, but the terms of a small product may be large: an estimate.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/backend.hpp"
#include "cpu/pool.hpp"
#include "cpu/tile.hpp"

namespace laprox::cpu {

// Columns of u that are computed for all heads before their products are taken: what stays in the first-level cache.
inline constexpr int kFactorColumns = 24;

// Columns [first, first + columns) of the W_h of a query head, as `multiply` takes them: a column a row of the panels.
void pack_projection(const Kernels& kernels, const ModelShape& model, int layer, int query_head, int first, int columns, float* panels);

// A run of factor columns: u_h for h = first_head .. R - 1, panels of (R - first_head) * columns rows, head after head.
struct FactorChunk {
  int first_head;
  int first_column;  // in the whole factor
  int columns;
  int64_t panels;  // offset of its panels, in floats
};

struct HeadFactor {
  std::vector<float> panels;
  std::vector<FactorChunk> chunks;
  std::vector<float> singular;  // [R] upper bounds of the largest singular values of W_h
  std::vector<float> forms;     // of all pairs of heads, as Kernels::forms takes them, where there are pairs
  // The largest ||W_h||_F / singular[h]; infinity where there are no forms, or numbers are too large or small for them.
  float spread = std::numeric_limits<float>::infinity();
};

class CpuFactors final : public Factors {
 public:
  // Leaves layers without a projection empty. Throws NON_FINITE where a weight is not finite.
  CpuFactors(const ModelShape& model, Pool& pool, const Kernels& kernels, const lpx_call& call);

  const HeadFactor& head(int layer, int kv_head) const {
    return heads_[static_cast<size_t>(layer) * static_cast<size_t>(kv_heads_) + static_cast<size_t>(kv_head)];
  }

 private:
  int kv_heads_;
  std::vector<HeadFactor> heads_;
};

}  // namespace laprox::cpu
