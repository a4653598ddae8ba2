#include <algorithm>

#include "cuda/kernels/scan_mma.cuh"
#include "cuda/launch/attention.hpp"

namespace laprox::cuda {
namespace {

// Warps that share a band's tokens.
int scan_teams(const ScanView& v) { return v.panel_bands <= 2 ? 2 : 1; }
int log_sum_teams(const ScanView& v) { return std::min(kLogSumWarps / 2 / v.panel_bands, 2); }  // of two warps a band, each with half of a tile

template <typename T, int D>
struct Kernels {
  static constexpr int kBytes = MmaTile<D>::kBytes * MmaTile<D>::kStages;

  template <typename Kernel, typename... Arguments>
  static void start(const Launch& launch, const ScanView& v, Kernel kernel, int64_t blocks, int band_warps, const char* stage,
                    Arguments... arguments) {
    launch.run(stage, kernel, static_cast<unsigned>(blocks), 32 * v.panel_bands * band_warps, kBytes, v, arguments...);
  }
  static void sample(const Launch& launch, const ScanView& v) {
    const int64_t blocks = int64_t{v.g.segments} * v.panels;
    start(launch, v, sample_mma<T, D>, blocks, 2 * log_sum_teams(v), "sample");
  }
  static void scan(const Launch& launch, const ScanView& v) {
    start(launch, v, scan_teams(v) == 1 ? scan_mma<T, D, 1> : scan_mma<T, D, 2>, int64_t{v.workers} * v.panels, scan_teams(v), "scan");
  }
  static void repair(const Launch& launch, const ScanView& v, const ScanResults& to) {
    start(launch, v, repair_mma<T, D>, int64_t{v.workers} * v.panels, 2 * log_sum_teams(v), "repair of the scan", to);
  }
};

// Calls `run` with the kernels of a dtype and head dimension.
template <typename T, typename Run>
void with_head_dim(int d, Run run) {
  switch (d) {
    case 64: return run(Kernels<T, 64>{});
    case 96: return run(Kernels<T, 96>{});
    case 128: return run(Kernels<T, 128>{});
    case 256: return run(Kernels<T, 256>{});
    default: fail(LPX_INTERNAL, "no tensor-core scan for head dimension %d", d);
  }
}
template <typename Run>
void with_kernels(lpx_dtype dtype, int d, Run run) {
  if (dtype == LPX_BF16) return with_head_dim<__nv_bfloat16>(d, run);
  with_head_dim<__half>(d, run);
}

}  // namespace

void sample_mma(const Launch& launch, const ScanView& v, lpx_dtype dtype) {
  with_kernels(dtype, v.g.head_dim, [&](auto kernels) { kernels.sample(launch, v); });
}
void scan_mma(const Launch& launch, const ScanView& v, lpx_dtype dtype) {
  with_kernels(dtype, v.g.head_dim, [&](auto kernels) { kernels.scan(launch, v); });
}
void repair_mma(const Launch& launch, const ScanView& v, const ScanResults& to, lpx_dtype dtype) {
  with_kernels(dtype, v.g.head_dim, [&](auto kernels) { kernels.repair(launch, v, to); });
}

}  // namespace laprox::cuda
