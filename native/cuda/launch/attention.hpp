// The window's attention on a cache: log-sum-exps and, for bounds, sums of squares (kernels/scan.cuh has the formulas).
#pragma once

#include "cuda/kernels/scan.cuh"
#include "cuda/launch/launch.hpp"
#include "cuda/launch/path.hpp"

namespace laprox::cuda {

class Attention {
 public:
  // squares: whether the sums of e^2 are wanted. The sums over tokens are the same with and without.
  Attention(Arena& arena, const Geometry& shape, lpx_dtype cache, lpx_dtype window, bool squares, Path path);

  // Five launches: sample, scan, finish, and the repair of outgrown references, which ends at once where there are none.
  void run(const Launch& launch, const Geometry& g) const;
  // The stages of run(), for measurements.
  void sample(const Launch& launch, const Geometry& g) const;
  void scan(const Launch& launch, const Geometry& g) const;
  void finish(const Launch& launch, const Geometry& g) const;

  // [segments][R * m], row h * m + q, in base 2: given or computed, sink logits included; +inf for rows that do not exist or
  // see nothing.
  const float* log_sums() const { return log_sums_; }
  // [segments][R][stride]: sums over the rows of e^2; +inf where one overflowed.
  const float* squares() const { return view_.squares; }
  // [segments][R]: ||a_h[:,i]||^2 <= inflation * squares, with a margin for rounding.
  const float* inflation() const { return inflation_; }

 private:
  ScanView view(const Geometry& g) const;

  lpx_dtype cache_;
  lpx_dtype window_;
  Path path_;  // never kAuto: kHopper falls back to kPortable where the chip is another
  ScanView view_{};
  float* log_sums_;
  float* inflation_;
};

// The kernels of a path; each in a file of its own, since they take long to compile.
void sample_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window);
void scan_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window);
void repair_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window);
void sample_mma(const Launch& launch, const ScanView& v, lpx_dtype dtype);
void scan_mma(const Launch& launch, const ScanView& v, lpx_dtype dtype);
void repair_mma(const Launch& launch, const ScanView& v, lpx_dtype dtype);
void scan_wgmma(const Launch& launch, const ScanView& v, lpx_dtype dtype);

}  // namespace laprox::cuda
