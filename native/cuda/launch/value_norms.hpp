// ||v||_2 of every row.
#pragma once

#include "cuda/kernels/views.cuh"
#include "cuda/launch/launch.hpp"

namespace laprox::cuda {

// Writes the value_norm planes of all layers that have one; or, where `norms` is not null, norms [segments][stride] of all others.
void value_norms(const Launch& launch, const Geometry& geometry, lpx_dtype cache, float* norms);

}  // namespace laprox::cuda
