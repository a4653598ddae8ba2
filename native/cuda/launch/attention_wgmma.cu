#include "core/status.hpp"
#include "cuda/kernels/scan_wgmma.cuh"
#include "cuda/launch/attention.hpp"

namespace laprox::cuda {
namespace {

template <typename T, int D, int Bands, ScanFor For>
void start(const Launch& launch, const ScanView& v, const StatisticView& statistic) {
  constexpr int kBytes = WgmmaScan<T, D, Bands>::kBytes;
  const auto blocks = static_cast<unsigned>(all_panels(For) ? v.workers * v.panels : v.workers);
  launch.run("scan", scan_wgmma<T, D, Bands, For>, blocks, kGroups * kWarpgroup, kBytes, v, statistic);
}

template <typename T, int D, ScanFor For>
void with_bands(const Launch& launch, const ScanView& v, const StatisticView& statistic) {
  switch (v.panel_bands) {
    case 1: return start<T, D, 1, For>(launch, v, statistic);
    case 2: return start<T, D, 2, For>(launch, v, statistic);
    case 3: return start<T, D, 3, For>(launch, v, statistic);
    default: return start<T, D, 4, For>(launch, v, statistic);
  }
}

template <typename T, ScanFor For>
void with_head_dim(const Launch& launch, const ScanView& v, const StatisticView& statistic) {
  if (v.g.head_dim == 64) return with_bands<T, 64, For>(launch, v, statistic);
  if (v.g.head_dim == 128) return with_bands<T, 128, For>(launch, v, statistic);
  fail(LPX_INTERNAL, "no Hopper scan for head dimension %d", v.g.head_dim);
}

template <ScanFor For>
void with_dtype(const Launch& launch, const ScanView& v, const StatisticView& statistic, lpx_dtype dtype) {
  if (dtype == LPX_BF16) return with_head_dim<__nv_bfloat16, For>(launch, v, statistic);
  with_head_dim<__half, For>(launch, v, statistic);
}

}  // namespace

void scan_wgmma(const Launch& launch, const ScanView& v, lpx_dtype dtype) { with_dtype<ScanFor::kSums>(launch, v, {}, dtype); }

void roots_wgmma(const Launch& launch, const ScanView& v, const StatisticView& lists, lpx_dtype dtype) {
  with_dtype<ScanFor::kRoots>(launch, v, lists, dtype);
}

void score_wgmma(const Launch& launch, const ScanView& v, const StatisticView& statistic, bool squares, lpx_dtype dtype) {
  if (squares) return with_dtype<ScanFor::kEnergy>(launch, v, statistic, dtype);
  with_dtype<ScanFor::kAverage>(launch, v, statistic, dtype);
}

}  // namespace laprox::cuda
