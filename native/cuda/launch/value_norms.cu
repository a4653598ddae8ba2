#include <algorithm>

#include "cuda/kernels/value_norms.cuh"
#include "cuda/launch/value_norms.hpp"

namespace laprox::cuda {
namespace {

template <typename T>
void run(const Launch& launch, const Geometry& g, float* norms) {
  const dim3 grid(static_cast<unsigned>(std::max<int64_t>(1, ceil_div(g.max_length, kNormTokens))),
                  static_cast<unsigned>(std::min(g.segments, 65535)));
  const int lanes = row_lanes(g.head_dim * static_cast<int64_t>(sizeof(T)));
  const auto kernel = lanes == 8 ? value_norm_kernel<T, 8> : lanes == 16 ? value_norm_kernel<T, 16> : value_norm_kernel<T, 32>;
  launch.run("value norms", kernel, grid, 256, 0, g, norms);
}

}  // namespace

void value_norms(const Launch& launch, const Geometry& geometry, lpx_dtype cache, float* norms) {
  switch (cache) {
    case LPX_F32: return run<float>(launch, geometry, norms);
    case LPX_F16: return run<__half>(launch, geometry, norms);
    case LPX_BF16: return run<__nv_bfloat16>(launch, geometry, norms);
  }
}

}  // namespace laprox::cuda
