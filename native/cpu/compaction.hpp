// Moves kept rows: bytes, whatever the dtype.
#pragma once

#include "core/geometry.hpp"
#include "cpu/pool.hpp"
#include "cpu/tile.hpp"
#include "laprox/laprox.h"

namespace laprox::cpu {

// Everything has been checked: this cannot fail, and it is not interrupted half-way.
void compact(Pool& pool, const Kernels& kernels, const Cache& cache, const lpx_selection& selection, const lpx_compaction& target);

}  // namespace laprox::cpu
