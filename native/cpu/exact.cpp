#include "cpu/exact.hpp"

#include <algorithm>
#include <cmath>

namespace laprox::cpu {
namespace {

constexpr float kLeastShare = 1e-9f;  // of the largest singular value, in bounds: its square times one of attention is a normal number

// A uniform number in [0, 1) for RANDOM: splitmix64 over what names the entry.
float random_score(uint64_t seed, Segment s, int32_t position) {
  uint64_t x = seed;
  for (const uint64_t part : {static_cast<uint64_t>(s.layer), static_cast<uint64_t>(s.head), static_cast<uint64_t>(position)}) {
    x += 0x9e3779b97f4a7c15u + part;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
  }
  return static_cast<float>(x >> 40) * 0x1p-24f;
}

}  // namespace

Exact::Exact(Workspace& workspace, const ScoreInputs& inputs, const Kernels& kernels, const Attention* attention)
    : inputs_(inputs), kernels_(kernels), attention_(attention), factors_(static_cast<const CpuFactors&>(inputs.factors)) {
  if (inputs.rule.statistic != LPX_REMOVAL) return;
  const int64_t rows = int64_t{attention->heads()} * attention->rows();
  const int64_t segments = inputs.cache.segments().count();
  int64_t longest = 0;
  for (int64_t i = 0; i < segments; ++i) longest = std::max<int64_t>(longest, inputs.cache.length(i));
  projected_outputs_ = workspace.take<float>(segments * rows * factor_width());
  output_partials_ = workspace.take<float>((longest + kBlock - 1) / kBlock * rows * inputs.model.head_dim);
}

void Exact::prepare(Pool& pool, std::vector<Scratch>& scratch, Progress& progress) {
  if (inputs_.rule.statistic != LPX_REMOVAL) return;
  const int rows = attention_->heads() * attention_->rows();
  const int d = inputs_.model.head_dim;
  const int64_t size = int64_t{rows} * d;
  for (int64_t segment = 0; segment < inputs_.cache.segments().count(); ++segment) {
    const int32_t n = inputs_.cache.length(segment);
    const int64_t blocks = (n + kBlock - 1) / kBlock;
    // o_h[q] = sum over i of a_h[q, i] v_i: block by block, then the blocks in order.
    pool.run(blocks, [&](int64_t block, int worker) {
      if (progress.cancelled()) return;
      Scratch& local = scratch[static_cast<size_t>(worker)];
      const Rows values = inputs_.cache.values(inputs_.cache.segments().at(segment));
      float* outputs = output_partials_ + block * size;
      std::fill_n(outputs, size, 0.0f);
      int32_t tokens[kTile];
      const auto end = static_cast<int32_t>(std::min<int64_t>(n, (block + 1) * kBlock));
      for (auto first = static_cast<int32_t>(block * kBlock); first < end; first += kTile) {
        const int count = std::min<int32_t>(kTile, end - first);
        for (int i = 0; i < count; ++i) tokens[i] = first + i;
        attention_->attend(segment, tokens, count, local);
        for (int row = 0; row < rows; ++row) std::fill(local.logits + row * kTile + count, local.logits + (row + 1) * kTile, 0.0f);
        std::fill_n(local.plain, int64_t{kTile} * d, 0.0f);
        for (int i = 0; i < count; ++i) kernels_.convert(inputs_.cache.dtype(), values(tokens[i]), d, local.plain + i * d);
        kernels_.add_outputs(local.logits, rows, local.plain, d, outputs);
      }
    });
    progress.check();
    if (blocks == 0) continue;
    for (int64_t block = 1; block < blocks; ++block)
      for (int64_t i = 0; i < size; ++i) output_partials_[i] += output_partials_[block * size + i];
    project_outputs(segment, output_partials_, scratch[0]);
  }
}

// o_h[q] L_h, with the rows of `outputs` as the tokens of a tile.
void Exact::project_outputs(int64_t segment, const float* outputs, Scratch& scratch) {
  const Segment s = inputs_.cache.segments().at(segment);
  const HeadFactor& factor = factors_.head(s.layer, s.head);
  const int m = attention_->rows();
  const int d = inputs_.model.head_dim;
  float* to = projected_outputs_ + segment * attention_->heads() * m * factor_width();
  for (int h = 0; h < attention_->heads(); ++h) {
    for (int first = 0; first < m; first += kTile) {
      const int count = std::min(kTile, m - first);
      for (int i = 0; i < count; ++i) scratch.rows[i] = outputs + (int64_t{h} * m + first + i) * d;
      kernels_.load(LPX_F32, scratch.rows, count, d, scratch.values);
      for (const FactorChunk& chunk : factor.chunks) {
        if (h < chunk.first_head) continue;
        kernels_.multiply(factor.panels.data() + chunk.panels, (inputs_.model.group - chunk.first_head) * chunk.columns, d, scratch.values, count,
                          scratch.columns);
        const float* own = scratch.columns + static_cast<ptrdiff_t>(h - chunk.first_head) * chunk.columns * kTile;
        for (int c = 0; c < chunk.columns; ++c)
          for (int i = 0; i < count; ++i) to[(int64_t{h} * m + first + i) * factor_width() + chunk.first_column + c] = own[c * kTile + i];
      }
    }
  }
}

void Exact::load_values(int64_t segment, const int32_t* tokens, int count, Scratch& scratch) const {
  const Rows values = inputs_.cache.values(inputs_.cache.segments().at(segment));
  for (int i = 0; i < count; ++i) scratch.rows[i] = values(tokens[i]);
  kernels_.load(inputs_.cache.dtype(), scratch.rows, count, inputs_.model.head_dim, scratch.values);
}

void Exact::value_pairs(int64_t segment, int count, Scratch& scratch) const {
  const Segment s = inputs_.cache.segments().at(segment);
  const HeadFactor& factor = factors_.head(s.layer, s.head);
  const int heads = inputs_.model.group;
  std::fill_n(scratch.value_pairs, pair_count(heads) * kTile, 0.0f);
  for (const FactorChunk& chunk : factor.chunks) {
    const int chunk_heads = heads - chunk.first_head;
    kernels_.multiply(factor.panels.data() + chunk.panels, chunk_heads * chunk.columns, inputs_.model.head_dim, scratch.values, count,
                      scratch.columns);
    kernels_.pair_products(scratch.columns, chunk_heads, chunk.columns, chunk.first_head, scratch.value_pairs);
  }
}

void Exact::attention_pairs(int64_t segment, const int32_t* tokens, int count, Scratch& scratch) const {
  attention_->attend(segment, tokens, count, scratch);
  std::fill_n(scratch.attention_pairs, pair_count(inputs_.model.group) * kTile, 0.0f);
  kernels_.pair_products(scratch.logits, attention_->heads(), attention_->rows(), 0, scratch.attention_pairs);
}

void Exact::load_terms(int64_t segment, const int32_t* tokens, int count, Scratch& scratch) const {
  prefetch(inputs_.cache.values(inputs_.cache.segments().at(segment)), tokens, count, inputs_.cache.row_bytes());
  attention_pairs(segment, tokens, count, scratch);
  load_values(segment, tokens, count, scratch);
}

uint32_t Exact::combine(float* out, Scratch& scratch) const {
  if (inputs_.rule.statistic == LPX_JOINT) return kernels_.joint(scratch.attention_pairs, scratch.value_pairs, inputs_.model.group, out);
  kernels_.bound(scratch.attention_pairs, scratch.value_pairs, inputs_.model.group, out);
  return 0;
}

void Exact::largest_scores(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const {
  const Segment s = inputs_.cache.segments().at(segment);
  const std::vector<float>& singular = factors_.head(s.layer, s.head).singular;
  const float largest = *std::max_element(singular.begin(), singular.end());
  const auto share = [&](int h) { return std::max(singular[static_cast<size_t>(h)] / largest, kLeastShare); };
  attention_pairs(segment, tokens, count, scratch);
  for (int other = 0; other < inputs_.model.group; ++other)
    for (int h = 0; h <= other; ++h) std::fill_n(scratch.value_pairs + pair_index(h, other) * kTile, kTile, share(h) * share(other));
  float scores[kTile];
  combine(scores, scratch);
  for (int i = 0; i < count; ++i) out[i] = scores[i] * largest;
}

void Exact::estimates(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const {
  const Segment s = inputs_.cache.segments().at(segment);
  load_terms(segment, tokens, count, scratch);
  kernels_.forms(factors_.head(s.layer, s.head).forms.data(), pair_count(inputs_.model.group), inputs_.model.head_dim, scratch.values, count,
                 scratch.value_pairs);
  float scores[kTile];
  combine(scores, scratch);
  std::copy_n(scores, count, out);
  weigh(segment, count, out);
}

// What rounding can add to an estimate and to a score, in units of 2^-24 of ||v||^2 * sum over h, h' of <a_h, a_h'> s_h s_h', which is at most U^2.
// A sum of n products of rounded numbers is off by n + 1 at most, of the sum of their magnitudes. That is ||v||^2 ||M_hh'||_F <= ||v||^2 spread
// s_h s_h' of a form, rows of which are summed up, and ||v|| ||W_h||_F <= ||v|| spread s_h of u_h.
float Exact::estimate_error(int64_t segment) const {
  const Segment s = inputs_.cache.segments().at(segment);
  const double spread = static_cast<double>(factors_.head(s.layer, s.head).spread);
  const double d = inputs_.model.head_dim;
  const double heads = inputs_.model.group;
  const double forms = (2 * d + 2) * spread;
  const double factors = 2 * (d + 1) * spread + heads * d;
  const double dropped = spread * spread;  // columns of the factor: see kRankTolerance
  const double pairs = 2 * (pair_count(inputs_.model.group) + 2);
  const double term_by_term = 2 * heads + static_cast<double>(kCancelled) * attention_->rows() * heads * d;
  constexpr double kRest = 32;  // roots, weights, and products of these errors
  return static_cast<float>(1.01 * 0x1p-24 * (forms + factors + dropped + pairs + term_by_term + kRest));
}

void Exact::scores_from_attention(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const {
  load_terms(segment, tokens, count, scratch);
  value_pairs(segment, count, scratch);
  float scores[kTile];
  const uint32_t cancelled = combine(scores, scratch) & UINT32_MAX >> (kTile - count);
  if (cancelled != 0) {
    float slow[kTile];
    joint_term_by_term(segment, count, slow, scratch);
    for (int t = 0; t < count; ++t)
      if ((cancelled >> t & 1) != 0) scores[t] = slow[t];
  }
  std::copy_n(scores, count, out);
}

void Exact::joint_term_by_term(int64_t segment, int count, float* out, Scratch& scratch) const {
  const Segment s = inputs_.cache.segments().at(segment);
  const HeadFactor& factor = factors_.head(s.layer, s.head);
  const int m = attention_->rows();
  std::fill_n(out, kTile, 0.0f);
  const std::vector<float> zeros(kFactorColumns, 0.0f);  // the change of an output that was nothing
  for (const FactorChunk& chunk : factor.chunks) {
    const int chunk_heads = inputs_.model.group - chunk.first_head;
    kernels_.multiply(factor.panels.data() + chunk.panels, chunk_heads * chunk.columns, inputs_.model.head_dim, scratch.values, count,
                      scratch.columns);
    kernels_.removal(scratch.logits + static_cast<ptrdiff_t>(chunk.first_head) * m * kTile, zeros.data(), 0, 0, scratch.columns, chunk_heads, m,
                     chunk.columns, out);
  }
  for (int t = 0; t < kTile; ++t) out[t] = std::sqrt(out[t]);
}

void Exact::attention_factor(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const {
  if (inputs_.rule.attention == LPX_ATTENTION_NONE) {
    std::fill_n(out, kTile, 1.0f);
    return;
  }
  attention_->attend(segment, tokens, count, scratch);
  kernels_.attention_statistic(scratch.logits, attention_->heads(), attention_->rows(),
                               attention_->existing_rows(inputs_.cache.segments().at(segment)), inputs_.rule.attention, scratch.heads);
  kernels_.aggregate(scratch.heads, inputs_.model.group, inputs_.rule.aggregation, out);
}

// scratch.heads = ||v W_h||_1, the columns of W_h taken some at a time from where the caller keeps them.
void Exact::projected_magnitudes(int64_t segment, int count, Scratch& scratch) const {
  const Segment s = inputs_.cache.segments().at(segment);
  const ModelShape& model = inputs_.model;
  const int d = model.head_dim;
  std::fill_n(scratch.heads, model.group * kTile, 0.0f);
  for (int h = 0; h < model.group; ++h) {
    for (int first = 0; first < model.model_dim; first += kFactorColumns) {
      const int columns = std::min(kFactorColumns, model.model_dim - first);
      pack_projection(kernels_, model, s.layer, s.head * model.group + h, first, columns, scratch.panels);
      kernels_.multiply(scratch.panels, columns, d, scratch.values, count, scratch.columns);
      kernels_.add_magnitudes(scratch.columns, columns, scratch.heads + h * kTile);
    }
  }
}

void Exact::value_factor(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const {
  const int heads = inputs_.model.group;
  switch (inputs_.rule.value) {
    case LPX_VALUE_NONE: std::fill_n(out, kTile, 1.0f); return;
    case LPX_VALUE_L1:
    case LPX_VALUE_L2: {
      const Rows values = inputs_.cache.values(inputs_.cache.segments().at(segment));
      for (int i = 0; i < count; ++i) scratch.rows[i] = values(tokens[i]);
      const auto length = inputs_.rule.value == LPX_VALUE_L1 ? kernels_.magnitudes : kernels_.norms;
      length(inputs_.cache.dtype(), scratch.rows, count, inputs_.model.head_dim, scratch.heads);
      for (int h = 1; h < heads; ++h) std::copy_n(scratch.heads, count, scratch.heads + h * kTile);
      break;
    }
    case LPX_VALUE_PROJECTED_L1:
      load_values(segment, tokens, count, scratch);
      projected_magnitudes(segment, count, scratch);
      break;
    case LPX_VALUE_PROJECTED_L2:
      load_values(segment, tokens, count, scratch);
      value_pairs(segment, count, scratch);
      for (int h = 0; h < heads; ++h)
        for (int i = 0; i < kTile; ++i) scratch.heads[h * kTile + i] = std::sqrt(scratch.value_pairs[pair_index(h, h) * kTile + i]);
      break;
  }
  kernels_.aggregate(scratch.heads, heads, inputs_.rule.aggregation, out);
}

void Exact::removal(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const {
  const Segment s = inputs_.cache.segments().at(segment);
  const HeadFactor& factor = factors_.head(s.layer, s.head);
  const int heads = attention_->heads();
  const int m = attention_->rows();
  attention_->attend(segment, tokens, count, scratch);
  kernels_.removal_weights(scratch.logits, heads * m);
  load_values(segment, tokens, count, scratch);
  float* squares = scratch.value_pairs;
  std::fill_n(squares, kTile, 0.0f);
  const float* outputs = projected_outputs_ + segment * heads * m * factor_width();
  for (const FactorChunk& chunk : factor.chunks) {
    const int chunk_heads = heads - chunk.first_head;
    kernels_.multiply(factor.panels.data() + chunk.panels, chunk_heads * chunk.columns, inputs_.model.head_dim, scratch.values, count,
                      scratch.columns);
    kernels_.removal(scratch.logits + static_cast<ptrdiff_t>(chunk.first_head) * m * kTile,
                     outputs + int64_t{chunk.first_head} * m * factor_width() + chunk.first_column, int64_t{m} * factor_width(), factor_width(),
                     scratch.columns, chunk_heads, m, chunk.columns, squares);
  }
  for (int i = 0; i < count; ++i) out[i] = std::sqrt(squares[i]);
}

void Exact::weigh(int64_t segment, int count, float* out) const {
  if (inputs_.rule.layer_weights == nullptr) return;
  const float weight = inputs_.rule.layer_weights[inputs_.cache.segments().at(segment).layer];
  for (int i = 0; i < count; ++i) out[i] *= weight;
}

void Exact::scores(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const {
  const Segment s = inputs_.cache.segments().at(segment);
  switch (inputs_.rule.statistic) {
    case LPX_JOINT:
    case LPX_BOUND: scores_from_attention(segment, tokens, count, out, scratch); break;
    case LPX_REMOVAL: removal(segment, tokens, count, out, scratch); break;
    case LPX_FACTORED: {
      float attention[kTile];
      attention_factor(segment, tokens, count, attention, scratch);
      std::copy_n(attention, count, out);
      if (inputs_.rule.sharing == LPX_SHARE_LAYER) return;  // weighed by multiply_values
      multiply_values(segment, tokens, count, out, scratch);
      return;
    }
    case LPX_KEY_NORM: {
      const Rows keys = inputs_.cache.keys(s);
      for (int i = 0; i < count; ++i) scratch.rows[i] = keys(tokens[i]);
      kernels_.norms(inputs_.cache.dtype(), scratch.rows, count, inputs_.model.head_dim, out);
      for (int i = 0; i < count; ++i) out[i] = -out[i];
      break;
    }
    case LPX_RECENCY:
      for (int i = 0; i < count; ++i) out[i] = static_cast<float>(inputs_.cache.position(s, tokens[i]));
      break;
    case LPX_RANDOM:
      for (int i = 0; i < count; ++i) out[i] = random_score(inputs_.rule.seed, s, inputs_.cache.position(s, tokens[i]));
      break;
  }
  weigh(segment, count, out);
}

void Exact::share(const std::vector<float*>& heads, int64_t count) const {
  const lpx_aggregation aggregation = inputs_.rule.aggregation;
  for (int64_t i = 0; i < count; ++i) {
    float value = heads[0][i];
    if (aggregation == LPX_AGGREGATE_RSS) value *= value;
    for (size_t h = 1; h < heads.size(); ++h) {
      const float other = heads[h][i];
      switch (aggregation) {
        case LPX_AGGREGATE_MAX: value = other > value || other != other ? other : value; break;
        case LPX_AGGREGATE_RSS: value += other * other; break;
        default: value += other;
      }
    }
    if (aggregation == LPX_AGGREGATE_RSS) value = std::sqrt(value);
    if (aggregation == LPX_AGGREGATE_MEAN) value /= static_cast<float>(heads.size());
    for (float* head : heads) head[i] = value;
  }
}

void Exact::multiply_values(int64_t segment, const int32_t* tokens, int count, float* scores, Scratch& scratch) const {
  if (inputs_.rule.value != LPX_VALUE_NONE) {
    float values[kTile];
    value_factor(segment, tokens, count, values, scratch);
    for (int i = 0; i < count; ++i) scores[i] *= values[i];
  }
  weigh(segment, count, scores);
}

}  // namespace laprox::cpu
