#include "cuda/launch/exact_portable.hpp"

namespace laprox::cuda {
namespace {

template <typename T, int R, int D>
void run(const Launch& launch, const PortableArguments& a) {
  using Shape = PortableShape<R, D>;
  const auto kernel = portable_kernel<T, R, D>;
  int device = 0;
  int most = 0;
  check(cudaGetDevice(&device), "exact scores");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "exact scores");
  constexpr int kStatic = (Shape::kMaxChunks + 1) * 4 + 128;
  int warps = 8;
  while (warps > 1 && Shape::shared(warps) + kStatic > most) warps /= 2;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::shared(warps)), "exact scores");
  launch.run("exact scores", tile_kernel, 1, 1024, 0, a.geometry, a.lists, warps * Shape::kTokens, a.tiles);
  launch.run("exact scores", kernel, static_cast<unsigned>(launch.multiprocessors), static_cast<unsigned>(warps * 32),
             static_cast<size_t>(Shape::shared(warps)), a.geometry, a.tiles, a.lists, a.queries, a.lse, a.factors, a.rule, a.scores);
}

template <typename T, int R>
void run_group(const Launch& launch, const PortableArguments& a) {
  switch (a.geometry.head_dim) {
    case 64: return run<T, R, 64>(launch, a);
    case 96: return run<T, R, 96>(launch, a);
    case 128: return run<T, R, 128>(launch, a);
    default: return run<T, R, 256>(launch, a);
  }
}

template <typename T>
void run_dtype(const Launch& launch, const PortableArguments& a) {
  if (a.geometry.group <= 4)
    run_group<T, 4>(launch, a);
  else
    run_group<T, 8>(launch, a);
}

}  // namespace

bool portable_serves(int group, int head_dim) {
  return group <= kMaxFastGroup && (head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256);
}

void portable_scores(const Launch& launch, lpx_dtype dtype, const PortableArguments& arguments) {
  if (dtype == LPX_BF16)
    run_dtype<__nv_bfloat16>(launch, arguments);
  else
    run_dtype<__half>(launch, arguments);
}

}  // namespace laprox::cuda
