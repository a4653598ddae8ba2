#include "cuda/kernels/exact_hopper.cuh"
#include "cuda/launch/exact_hopper.hpp"

namespace laprox::cuda {
namespace {

template <typename T, int R, int D, bool Bound>
void run(const Launch& launch, const JointArguments& a) {
  using Shape = HopperShape<R, D>;
  static_assert(Shape::kTokens == kHopperTile, "tiles are numbered by those who list tokens");
  const auto kernel = joint_hopper_kernel<T, R, D, Bound>;
  launch.run("exact scores", kernel, static_cast<unsigned>(launch.multiprocessors), Shape::kThreads, Shape::kShared, a.geometry, a.tiles, a.lists,
             a.queries, a.lse, a.factors, a.scores);
}

template <typename T, int R, int D>
void run_rule(const Launch& launch, const JointArguments& a) {
  if (a.bound)
    run<T, R, D, true>(launch, a);
  else
    run<T, R, D, false>(launch, a);
}

template <typename T, int D>
void run_group(const Launch& launch, const JointArguments& a) {
  switch (a.geometry.group) {
    case 1: return run_rule<T, 1, D>(launch, a);
    case 2: return run_rule<T, 2, D>(launch, a);
    case 3: return run_rule<T, 3, D>(launch, a);
    case 4: return run_rule<T, 4, D>(launch, a);
    case 5: return run_rule<T, 5, D>(launch, a);
    case 6: return run_rule<T, 6, D>(launch, a);
    case 7: return run_rule<T, 7, D>(launch, a);
    case 8: return run_rule<T, 8, D>(launch, a);
    default: fail(LPX_INTERNAL, "no kernel for %d heads", a.geometry.group);
  }
}

template <typename T>
void run_dtype(const Launch& launch, const JointArguments& a) {
  if (a.geometry.head_dim == 64)
    run_group<T, 64>(launch, a);
  else
    run_group<T, 128>(launch, a);
}

}  // namespace

bool hopper_joint_serves(int group, int head_dim) { return group <= kMaxFastGroup && (head_dim == 64 || head_dim == 128); }

void hopper_joint(const Launch& launch, lpx_dtype dtype, const JointArguments& arguments) {
  if (dtype == LPX_BF16)
    run_dtype<__nv_bfloat16>(launch, arguments);
  else
    run_dtype<__half>(launch, arguments);
}

}  // namespace laprox::cuda
