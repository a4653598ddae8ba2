#include <algorithm>

#include "cuda/kernels/scan_plain.cuh"
#include "cuda/launch/attention.hpp"

namespace laprox::cuda {
namespace {

template <ScanMode Mode>
void launch_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window, int64_t items, int64_t blocks, const char* stage) {
  const auto grid = static_cast<unsigned>(blocks);
  switch (cache) {
    case LPX_F32: scan_plain<float, Mode><<<grid, kPlainThreads, 0, launch.stream>>>(v, window, items); break;
    case LPX_F16: scan_plain<__half, Mode><<<grid, kPlainThreads, 0, launch.stream>>>(v, window, items); break;
    case LPX_BF16: scan_plain<__nv_bfloat16, Mode><<<grid, kPlainThreads, 0, launch.stream>>>(v, window, items); break;
  }
  launch.check(stage);
}

int64_t items(const ScanView& v) { return int64_t{v.g.segments} * v.splits * v.panels; }

}  // namespace

void sample_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window) {
  const int64_t blocks = int64_t{v.g.segments} * v.panels;
  launch_plain<ScanMode::kSample>(launch, v, cache, window, blocks, blocks, "sample");
}

void scan_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window) {
  launch_plain<ScanMode::kSums>(launch, v, cache, window, items(v), items(v), "scan");
}

void repair_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window) {
  launch_plain<ScanMode::kRepair>(launch, v, cache, window, items(v), std::min<int64_t>(items(v), launch.multiprocessors * 8), "repair of the scan");
}

}  // namespace laprox::cuda
