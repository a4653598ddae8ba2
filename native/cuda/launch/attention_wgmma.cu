#include "core/status.hpp"
#include "cuda/kernels/scan_wgmma.cuh"
#include "cuda/launch/attention.hpp"

namespace laprox::cuda {
namespace {

template <typename T, int D, int Bands>
void start(const Launch& launch, const ScanView& v) {
  constexpr int kBytes = WgmmaScan<T, D, Bands>::kBytes;
  const int64_t items = int64_t{v.g.segments} * v.splits * v.panels;
  check(cudaFuncSetAttribute(scan_wgmma<T, D, Bands>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "scan");
  scan_wgmma<T, D, Bands><<<static_cast<unsigned>(items), kGroups * kWarpgroup, kBytes, launch.stream>>>(v);
  launch.check("scan");
}

template <typename T, int D>
void with_bands(const Launch& launch, const ScanView& v) {
  switch (v.panel_bands) {
    case 1: return start<T, D, 1>(launch, v);
    case 2: return start<T, D, 2>(launch, v);
    case 3: return start<T, D, 3>(launch, v);
    default: return start<T, D, 4>(launch, v);
  }
}

template <typename T>
void with_head_dim(const Launch& launch, const ScanView& v) {
  if (v.g.head_dim == 64) return with_bands<T, 64>(launch, v);
  if (v.g.head_dim == 128) return with_bands<T, 128>(launch, v);
  fail(LPX_INTERNAL, "no Hopper scan for head dimension %d", v.g.head_dim);
}

}  // namespace

void scan_wgmma(const Launch& launch, const ScanView& v, lpx_dtype dtype) {
  if (dtype == LPX_BF16) return with_head_dim<__nv_bfloat16>(launch, v);
  with_head_dim<__half>(launch, v);
}

}  // namespace laprox::cuda
