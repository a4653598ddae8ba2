#include "core/score_rule.hpp"

#include "core/status.hpp"

namespace laprox {

bool needs_window(const lpx_score_rule& rule) {
  switch (rule.statistic) {
    case LPX_JOINT:
    case LPX_BOUND:
    case LPX_REMOVAL: return true;
    case LPX_FACTORED: return rule.attention != LPX_ATTENTION_NONE;
    default: return false;
  }
}

bool needs_projection(const lpx_score_rule& rule) {
  switch (rule.statistic) {
    case LPX_JOINT:
    case LPX_BOUND:
    case LPX_REMOVAL: return true;
    case LPX_FACTORED: return rule.value == LPX_VALUE_PROJECTED_L1 || rule.value == LPX_VALUE_PROJECTED_L2;
    default: return false;
  }
}

void check_score_rule(const lpx_score_rule* rule, const ModelShape& model) {
  check_struct(rule, "rule");
  if (rule->statistic < LPX_JOINT || rule->statistic > LPX_RANDOM)
    fail(LPX_INVALID_ARGUMENT, "rule->statistic is %d; expected one of lpx_statistic", static_cast<int>(rule->statistic));
  if (rule->attention < LPX_ATTENTION_MEAN || rule->attention > LPX_ATTENTION_NONE)
    fail(LPX_INVALID_ARGUMENT, "rule->attention is %d; expected one of lpx_attention_statistic", static_cast<int>(rule->attention));
  if (rule->value < LPX_VALUE_NONE || rule->value > LPX_VALUE_PROJECTED_L2)
    fail(LPX_INVALID_ARGUMENT, "rule->value is %d; expected one of lpx_value_statistic", static_cast<int>(rule->value));
  if (rule->aggregation < LPX_AGGREGATE_MEAN || rule->aggregation > LPX_AGGREGATE_RSS)
    fail(LPX_INVALID_ARGUMENT, "rule->aggregation is %d; expected one of lpx_aggregation", static_cast<int>(rule->aggregation));
  if (rule->sharing != LPX_SHARE_GROUP && rule->sharing != LPX_SHARE_LAYER)
    fail(LPX_INVALID_ARGUMENT, "rule->sharing is %d; expected LPX_SHARE_GROUP or LPX_SHARE_LAYER", static_cast<int>(rule->sharing));
  for (size_t i = 0; i < model.layers.size(); ++i) {
    if (needs_projection(*rule) && !model.layers[i].projection)
      fail(LPX_UNSUPPORTED, "this rule needs the output projection, and layer %zu of the model has none", i);
    if (rule->layer_weights == nullptr) continue;
    const float weight = rule->layer_weights[i];
    if (!(weight >= 0 && weight <= 3.4e38f))
      fail(LPX_INVALID_ARGUMENT, "rule->layer_weights[%zu] is %g; expected a finite number of 0 or more", i, weight);
  }
}

}  // namespace laprox
