// The check of a selection that a caller hands in.
#pragma once

#include "core/geometry.hpp"
#include "laprox/laprox.h"

namespace laprox {

// Throws unless its tokens exist in the cache and ascend in each segment.
void check_selection(const Cache& cache, const lpx_selection* selection);

}  // namespace laprox
