#include "cuda/kernels/scan_plain.cuh"
#include "cuda/launch/attention.hpp"

namespace laprox::cuda {
namespace {

template <ScanMode Mode>
void launch_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window, int64_t blocks, const char* stage,
                  const ScanResults& to = {}) {
  const auto grid = static_cast<unsigned>(blocks);
  switch (cache) {
    case LPX_F32: launch.run(stage, scan_plain<float, Mode>, grid, kPlainThreads, 0, v, window, to); break;
    case LPX_F16: launch.run(stage, scan_plain<__half, Mode>, grid, kPlainThreads, 0, v, window, to); break;
    case LPX_BF16: launch.run(stage, scan_plain<__nv_bfloat16, Mode>, grid, kPlainThreads, 0, v, window, to); break;
  }
}

int64_t workers(const ScanView& v) { return int64_t{v.workers} * v.panels; }

}  // namespace

void sample_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window) {
  launch_plain<ScanMode::kSample>(launch, v, cache, window, int64_t{v.g.segments} * v.panels, "sample");
}

void scan_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window) {
  launch_plain<ScanMode::kSums>(launch, v, cache, window, workers(v), "scan");
}

void repair_plain(const Launch& launch, const ScanView& v, const ScanResults& to, lpx_dtype cache, lpx_dtype window) {
  launch_plain<ScanMode::kRepair>(launch, v, cache, window, workers(v), "repair of the scan", to);
}

}  // namespace laprox::cuda
