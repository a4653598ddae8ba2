#include "cuda/kernels/exact_attention.cuh"
#include "cuda/launch/exact_attention.hpp"

namespace laprox::cuda {
namespace {

constexpr int kMaxSlabs = 3;  // of queries that fit beside two tiles of keys a warpgroup

template <typename T, int R, int D>
void run(const Launch& launch, const AttentionArguments& a) {
  using Shape = AttentionShape<R, D>;
  tile_kernel<<<1, 1024, 0, launch.stream>>>(a.geometry, a.lists, Shape::kTokens, a.tiles);
  launch.check("attention statistics");
  const auto slabs = static_cast<int>(ceil_div(a.geometry.rows, slab_rows(R, D)));
  const int stages = slabs == 1 ? 3 : 2;
  const auto shared = static_cast<int>(Shape::shared(slabs, stages));
  const auto kernel = attention_hopper_kernel<T, R, D>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "attention statistics");
  kernel<<<static_cast<unsigned>(launch.multiprocessors), Shape::kThreads, static_cast<size_t>(shared), launch.stream>>>(
      a.geometry, a.tiles, a.lists, a.queries, a.lse, stages, AttentionRule{a.statistic, a.aggregation, a.weigh}, a.scores);
  launch.check("attention statistics");
}

template <typename T, int D>
void run_group(const Launch& launch, const AttentionArguments& a) {
  switch (attention_group(a.geometry.group)) {
    case 1: return run<T, 1, D>(launch, a);
    case 2: return run<T, 2, D>(launch, a);
    case 4: return run<T, 4, D>(launch, a);
    default: return run<T, 8, D>(launch, a);
  }
}

template <typename T>
void run_dtype(const Launch& launch, const AttentionArguments& a) {
  if (a.geometry.head_dim == 64)
    run_group<T, 64>(launch, a);
  else
    run_group<T, 128>(launch, a);
}

}  // namespace

bool hopper_attention_serves(int group, int head_dim, int rows) {
  return group <= kMaxFastGroup && (head_dim == 64 || head_dim == 128) && ceil_div(rows, slab_rows(attention_group(group), head_dim)) <= kMaxSlabs;
}

void hopper_attention(const Launch& launch, lpx_dtype dtype, const AttentionArguments& arguments) {
  if (dtype == LPX_BF16)
    run_dtype<__nv_bfloat16>(launch, arguments);
  else
    run_dtype<__half>(launch, arguments);
}

}  // namespace laprox::cuda
