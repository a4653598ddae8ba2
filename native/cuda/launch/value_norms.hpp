// ||v||_2 of every row, for caches that keep it.
#pragma once

#include "cuda/kernels/views.cuh"
#include "cuda/launch/launch.hpp"

namespace laprox::cuda {

// Writes the value_norm planes of all layers that have one.
void value_norms(const Launch& launch, const Geometry& geometry, lpx_dtype cache);

}  // namespace laprox::cuda
