// The checks of a compaction: a selection that fits its cache, target rows inside their buffers, and nothing that overlaps.
#pragma once

#include "core/geometry.hpp"
#include "laprox/laprox.h"

namespace laprox {

int64_t pages_for(int64_t rows, int64_t page_size);

// Throws unless every kept row can be moved. After this, moving cannot fail.
void check_compaction(const Cache& cache, const lpx_selection* selection, const lpx_compaction* target);

}  // namespace laprox
