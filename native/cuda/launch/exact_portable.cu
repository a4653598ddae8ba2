#include "cuda/launch/exact_portable.hpp"

namespace laprox::cuda {
namespace {

// Warps of a block: as many as shared memory has room for.
template <int R, int D>
int warps_of_block() {
  using Shape = PortableShape<R, D>;
  int device = 0;
  int most = 0;
  check(cudaGetDevice(&device), "exact scores");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "exact scores");
  constexpr int kStatic = (Shape::kMaxChunks + 1) * 4 + 128;
  int warps = 8;
  while (warps > 1 && Shape::shared(warps) + kStatic > most) warps /= 2;
  return warps;
}

template <typename T, int R, int D>
void run(const Launch& launch, const PortableArguments& a) {
  using Shape = PortableShape<R, D>;
  const auto kernel = portable_kernel<T, R, D>;
  const int warps = warps_of_block<R, D>();
  launch.run("exact scores", kernel, static_cast<unsigned>(launch.multiprocessors), static_cast<unsigned>(warps * 32),
             static_cast<size_t>(Shape::shared(warps)), a.geometry, a.tiles, a.lists, a.queries, a.lse, a.factors, a.rule, a.scores);
}

template <int R>
int tile_of_group(int head_dim) {
  switch (head_dim) {
    case 64: return warps_of_block<R, 64>() * PortableShape<R, 64>::kTokens;
    case 96: return warps_of_block<R, 96>() * PortableShape<R, 96>::kTokens;
    case 128: return warps_of_block<R, 128>() * PortableShape<R, 128>::kTokens;
    default: return warps_of_block<R, 256>() * PortableShape<R, 256>::kTokens;
  }
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

int portable_tile(int group, int head_dim) { return group <= 4 ? tile_of_group<4>(head_dim) : tile_of_group<8>(head_dim); }

void portable_scores(const Launch& launch, lpx_dtype dtype, const PortableArguments& arguments) {
  if (dtype == LPX_BF16)
    run_dtype<__nv_bfloat16>(launch, arguments);
  else
    run_dtype<__half>(launch, arguments);
}

}  // namespace laprox::cuda
