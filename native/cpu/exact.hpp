// The exact score of any tokens of a segment, by every rule. The full path and the pruned path both end here.
#pragma once

#include <memory>

#include "cpu/attention.hpp"
#include "cpu/factors.hpp"

namespace laprox::cpu {

class Exact {
 public:
  // `attention` is null for rules that look at no query.
  Exact(Workspace& workspace, const ScoreInputs& inputs, const Kernels& kernels, const Attention* attention);

  // What has to be known of a whole segment first (attention outputs, for removal). Once the log-sum-exp is there.
  void prepare(Pool& pool, std::vector<Scratch>& scratch, Progress& progress);

  // Scores of up to kTile tokens, ascending.
  void scores(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const;

  // Joint scores by quadratic forms, weighted: |out^2 - score^2| <= estimate_error(segment) * U^2 with any U that the score's bound
  // sum over h of ||a_h|| s_h ||v|| is not above. An infinite error: there are no estimates.
  void estimates(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const;
  float estimate_error(int64_t segment) const;

  // What joint and bound scores are at most, for a value of norm 1 and unweighted: their formulas with s_h s_h' in place of <u_h, u_h'>.
  void largest_scores(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const;

  // Layer-wide sharing: `scores` of one (layer, sequence), head after head, hold each group's attention; afterwards each head
  // holds the layer's.
  void share(const std::vector<float*>& heads, int64_t count) const;
  // Scores of shared rules: the layer's attention times the value statistic. In place.
  void multiply_values(int64_t segment, const int32_t* tokens, int count, float* scores, Scratch& scratch) const;

 private:
  // Joint and bound scores from scratch.attention_pairs and scratch.value_pairs. Returns what Kernels::joint returns.
  uint32_t combine(float* out, Scratch& scratch) const;
  void scores_from_attention(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const;
  void load_values(int64_t segment, const int32_t* tokens, int count, Scratch& scratch) const;
  // scratch.value_pairs = <u_h, u_h'> of scratch.values.
  void value_pairs(int64_t segment, int count, Scratch& scratch) const;
  void attention_pairs(int64_t segment, const int32_t* tokens, int count, Scratch& scratch) const;
  // What joint and bound scores are made of: scratch.attention_pairs and scratch.values.
  void load_terms(int64_t segment, const int32_t* tokens, int count, Scratch& scratch) const;
  void attention_factor(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const;
  void value_factor(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const;
  void projected_magnitudes(int64_t segment, int count, Scratch& scratch) const;
  // out[t] = || sum over h of attention_h[:, t] (x) u_h[t] ||, term by term: no difference of large sums.
  void joint_term_by_term(int64_t segment, int count, float* out, Scratch& scratch) const;
  void removal(int64_t segment, const int32_t* tokens, int count, float* out, Scratch& scratch) const;
  void project_outputs(int64_t segment, const float* outputs, Scratch& scratch);
  void weigh(int64_t segment, int count, float* out) const;
  int factor_width() const { return inputs_.model.group * inputs_.model.head_dim; }

  const ScoreInputs& inputs_;
  const Kernels& kernels_;
  const Attention* attention_;
  const CpuFactors& factors_;
  float* projected_outputs_ = nullptr;  // [segments][R * m][R * d]: o_h[q] L_h, removal only
  float* output_partials_ = nullptr;    // [blocks of the longest segment][R * m][d]
};

}  // namespace laprox::cpu
