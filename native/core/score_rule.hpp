// What a score rule looks at, and whether a model has it.
#pragma once

#include "core/model.hpp"
#include "laprox/laprox.h"

namespace laprox {

// False for rules that look at no query.
bool needs_window(const lpx_score_rule& rule);

bool needs_projection(const lpx_score_rule& rule);

void check_score_rule(const lpx_score_rule* rule, const ModelShape& model);

}  // namespace laprox
