#include "cpu/factors.hpp"

#include <cmath>
#include <cstring>
#include <limits>

#include "core/status.hpp"

namespace laprox::cpu {
namespace {

constexpr int kBlock = 8;           // of Kernels::gram
constexpr int kChunkColumns = 256;  // columns of W that are summed at a time
constexpr double kRankTolerance = 1e-15;
constexpr float kLeastSingular = 1e-12f;  // whose square, of which forms consist, is far from the ends of float, as is its inverse

// A symmetric matrix in double, row-major, `size` a multiple of kBlock.
struct Matrix {
  explicit Matrix(int matrix_size) : size(matrix_size), data(static_cast<size_t>(matrix_size) * static_cast<size_t>(matrix_size), 0.0) {}
  double& at(int row, int column) { return data[static_cast<size_t>(row) * static_cast<size_t>(size) + static_cast<size_t>(column)]; }
  double* row(int index) { return data.data() + static_cast<size_t>(index) * static_cast<size_t>(size); }

  int size;
  std::vector<double> data;
};

// out += X X^T (lower half, then mirrored by the caller), X given as blocks of 8 rows: [size / 8][depth][8].
void add_gram(const Kernels& kernels, const std::vector<double>& blocks, int depth, Matrix& out) {
  double sums[kBlock * kBlock];
  const size_t stride = static_cast<size_t>(depth) * kBlock;
  for (int i = 0; i < out.size / kBlock; ++i) {
    for (int j = 0; j <= i; ++j) {
      kernels.gram(blocks.data() + static_cast<size_t>(i) * stride, blocks.data() + static_cast<size_t>(j) * stride, depth, sums);
      for (int a = 0; a < kBlock; ++a)
        for (int b = 0; b < kBlock; ++b) out.at(i * kBlock + a, j * kBlock + b) += sums[a * kBlock + b];
    }
  }
}

void mirror(Matrix& matrix) {
  for (int i = 0; i < matrix.size; ++i)
    for (int j = i + 1; j < matrix.size; ++j) matrix.at(i, j) = matrix.at(j, i);
}

// The Gram matrix of the stacked slices of one KV head.
Matrix stacked_gram(const ModelShape& model, const Layer& layer, int kv_head, const Kernels& kernels) {
  const int rows = model.group * model.head_dim;
  Matrix gram(rows);
  std::vector<double> blocks(static_cast<size_t>(rows) * kChunkColumns);
  float run[kChunkColumns];
  const auto element = static_cast<int64_t>(element_size(model.projection_dtype));
  for (int first = 0; first < model.model_dim; first += kChunkColumns) {
    const int columns = std::min(kChunkColumns, model.model_dim - first);
    for (int row = 0; row < rows; ++row) {
      const int64_t feature = int64_t{kv_head} * rows + row;
      double* to = blocks.data() + static_cast<size_t>(row / kBlock) * static_cast<size_t>(columns) * kBlock + row % kBlock;
      if (layer.projection.column_stride == element) {
        kernels.convert(model.projection_dtype, layer.projection.at(feature, first), columns, run);
      } else {
        for (int c = 0; c < columns; ++c) kernels.convert(model.projection_dtype, layer.projection.at(feature, first + c), 1, run + c);
      }
      for (int c = 0; c < columns; ++c) to[static_cast<size_t>(c) * kBlock] = run[c];
    }
    add_gram(kernels, blocks, columns, gram);
  }
  mirror(gram);
  return gram;
}

// In place: the lower triangle becomes L. Columns whose pivot is rounding noise of their own row become zero.
void cholesky(Matrix& matrix) {
  std::vector<double> diagonal;
  for (int i = 0; i < matrix.size; ++i) diagonal.push_back(matrix.at(i, i));
  for (int k = 0; k < matrix.size; ++k) {
    const double pivot = matrix.at(k, k);
    const double root = pivot > kRankTolerance * diagonal[static_cast<size_t>(k)] ? std::sqrt(pivot) : 0;
    matrix.at(k, k) = root;
    std::vector<double> column(static_cast<size_t>(matrix.size), 0.0);
    for (int i = k + 1; i < matrix.size; ++i) {
      matrix.at(i, k) = root == 0 ? 0 : matrix.at(i, k) / root;
      column[static_cast<size_t>(i)] = matrix.at(i, k);
    }
    for (int i = k + 1; i < matrix.size && root != 0; ++i) {
      const double factor = column[static_cast<size_t>(i)];
      double* row = matrix.row(i);
      for (int j = k + 1; j <= i; ++j) row[j] -= factor * column[static_cast<size_t>(j)];
    }
  }
}

// An upper bound of the square root of the largest eigenvalue of a positive semi-definite matrix: ||A^64||_F^(1/64) is at
// least that eigenvalue and at most size^(1/128) times it.
float singular_bound(const Kernels& kernels, Matrix power) {
  constexpr int kSquarings = 6;
  double log_scale = 0;  // power = A^(2^s) / exp(log_scale)
  std::vector<double> blocks(power.data.size());
  for (int s = 0;; ++s) {
    double norm = 0;
    for (const double x : power.data) norm += x * x;
    norm = std::sqrt(norm);
    if (norm == 0) return 0;
    log_scale += std::log(norm);
    if (s == kSquarings) return static_cast<float>(std::exp(0.5 * log_scale / (1 << kSquarings)) * (1 + 1e-6));
    for (double& x : power.data) x /= norm;
    log_scale *= 2;
    for (int i = 0; i < power.size; ++i)
      for (int k = 0; k < power.size; ++k)
        blocks[static_cast<size_t>(i / kBlock) * static_cast<size_t>(power.size) * kBlock + static_cast<size_t>(k) * kBlock +
               static_cast<size_t>(i % kBlock)] = power.at(i, k);
    std::fill(power.data.begin(), power.data.end(), 0.0);
    add_gram(kernels, blocks, power.size, power);
    mirror(power);
  }
}

// v M_hh' v^T = sum over i <= j of form[i][j] v_i v_j.
std::vector<float> forms_of(Matrix& gram, int heads, int d) {
  std::vector<float> forms;
  forms.reserve(static_cast<size_t>(pair_count(heads)) * static_cast<size_t>(d * (d + 1) / 2));
  std::vector<std::pair<int, int>> pairs;
  for (int other = 0; other < heads; ++other)
    for (int h = 0; h <= other; ++h) pairs.emplace_back(h * d, other * d);
  for (size_t first = 0; first < pairs.size(); first += kFormPairs) {
    const size_t end = std::min(first + kFormPairs, pairs.size());
    for (int i = 0; i < d; ++i) {
      for (int j = i; j < d; ++j) {
        for (size_t pair = first; pair < end; ++pair) {
          const auto [row, column] = pairs[pair];
          const double upper = gram.at(row + i, column + j);
          forms.push_back(static_cast<float>(i == j ? upper : upper + gram.at(row + j, column + i)));
        }
      }
    }
  }
  return forms;
}

// See HeadFactor::spread.
float spread_of(Matrix& gram, const std::vector<float>& singular, int d) {
  double spread = 1;
  for (size_t h = 0; h < singular.size(); ++h) {
    if (singular[h] == 0) continue;
    if (!(singular[h] > kLeastSingular && singular[h] < 1 / kLeastSingular)) return std::numeric_limits<float>::infinity();
    double squares = 0;
    for (int i = 0; i < d; ++i) squares += gram.at(static_cast<int>(h) * d + i, static_cast<int>(h) * d + i);
    spread = std::max(spread, std::sqrt(squares) / static_cast<double>(singular[h]));
  }
  return static_cast<float>(spread);
}

HeadFactor factorize(const ModelShape& model, int layer, int kv_head, const Kernels& kernels) {
  const int d = model.head_dim;
  Matrix gram = stacked_gram(model, model.layers[static_cast<size_t>(layer)], kv_head, kernels);
  for (int i = 0; i < gram.size; ++i)
    if (!std::isfinite(gram.at(i, i)))
      fail(LPX_NON_FINITE, "the output projection of layer %d, query head %d, feature %d has a weight that is not finite", layer,
           kv_head * model.group + i / d, i % d);
  HeadFactor factor;
  for (int h = 0; h < model.group; ++h) {
    Matrix own(d);
    for (int i = 0; i < d; ++i)
      for (int j = 0; j < d; ++j) own.at(i, j) = gram.at(h * d + i, h * d + j);
    factor.singular.push_back(singular_bound(kernels, std::move(own)));
  }
  if (model.group > 1) {
    factor.forms = forms_of(gram, model.group, d);
    factor.spread = spread_of(gram, factor.singular, d);
  }
  cholesky(gram);
  int rank = 0;  // columns behind it are zero
  for (int k = 0; k < gram.size; ++k)
    if (gram.at(k, k) != 0) rank = k + 1;
  for (int block = 0; block < model.group; ++block) {
    const int end = std::min((block + 1) * d, rank);
    for (int first = block * d; first < end; first += kFactorColumns) {
      const int columns = std::min(kFactorColumns, end - first);
      const int rows = (model.group - block) * columns;
      const FactorChunk chunk{block, first, columns, static_cast<int64_t>(factor.panels.size())};
      factor.panels.resize(factor.panels.size() + static_cast<size_t>(panels_for(rows)) * kPanel * static_cast<size_t>(d), 0.0f);
      float* panels = factor.panels.data() + chunk.panels;
      for (int row = 0; row < rows; ++row) {
        const int h = block + row / columns;
        const int column = first + row % columns;
        for (int k = 0; k < d; ++k) {
          const double value = h * d + k >= column ? gram.at(h * d + k, column) : 0.0;
          panels[(static_cast<size_t>(row / kPanel) * static_cast<size_t>(d) + static_cast<size_t>(k)) * kPanel + static_cast<size_t>(row % kPanel)] =
              static_cast<float>(value);
        }
      }
      factor.chunks.push_back(chunk);
    }
  }
  return factor;
}

}  // namespace

void pack_projection(const Kernels& kernels, const ModelShape& model, int layer, int query_head, int first, int columns, float* panels) {
  const Projection& projection = model.layers[static_cast<size_t>(layer)].projection;
  const int d = model.head_dim;
  const int64_t feature = int64_t{query_head} * d;
  const auto element = static_cast<int64_t>(element_size(model.projection_dtype));
  const auto at = [&](int c) { return panels + static_cast<ptrdiff_t>(c / kPanel) * d * kPanel + c % kPanel; };
  float run[kMaxHeadDim];
  static_assert(kFactorColumns <= kMaxHeadDim, "runs go along either side");
  if (projection.column_stride == element && projection.row_stride != element) {
    for (int k = 0; k < d; ++k) {
      kernels.convert(model.projection_dtype, projection.at(feature + k, first), columns, run);
      for (int c = 0; c < columns; ++c) at(c)[k * kPanel] = run[c];
    }
    return;
  }
  for (int c = 0; c < columns; ++c) {
    if (projection.row_stride == element) {
      kernels.convert(model.projection_dtype, projection.at(feature, first + c), d, run);
    } else {
      for (int k = 0; k < d; ++k) kernels.convert(model.projection_dtype, projection.at(feature + k, first + c), 1, run + k);
    }
    for (int k = 0; k < d; ++k) at(c)[k * kPanel] = run[k];
  }
}

CpuFactors::CpuFactors(const ModelShape& model, Pool& pool, const Kernels& kernels, const lpx_call& call) : kv_heads_(model.kv_heads) {
  const auto count = static_cast<int64_t>(model.layers.size()) * model.kv_heads;
  heads_.resize(static_cast<size_t>(count));
  Progress progress(call, count);
  std::vector<std::exception_ptr> errors(static_cast<size_t>(count));
  pool.run(count, [&](int64_t index, int) {
    const int layer = static_cast<int>(index / model.kv_heads);
    if (progress.cancelled() || !model.layers[static_cast<size_t>(layer)].projection) return;
    try {
      heads_[static_cast<size_t>(index)] = factorize(model, layer, static_cast<int>(index % model.kv_heads), kernels);
    } catch (...) { errors[static_cast<size_t>(index)] = std::current_exception(); }
    progress.advance(1);
  });
  progress.check();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace laprox::cpu
