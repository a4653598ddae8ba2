// What the CUDA backend derives from output projections, once a model: see kernels/factors_layout.cuh.
#pragma once

#include <cstdint>
#include <vector>

#include "core/model.hpp"
#include "cuda/kernels/factors_layout.cuh"
#include "cuda/launch/launch.hpp"

namespace laprox::cuda {

class DeviceFactors {
 public:
  // Projection pointers are device pointers. `precision` is that of the tensor-core image; f32: none is kept.
  // Leaves layers without a projection empty. Waits for the device. Throws NON_FINITE where a weight is not finite.
  DeviceFactors(const Launch& launch, const ModelShape& model, lpx_dtype precision);
  ~DeviceFactors();
  DeviceFactors(const DeviceFactors&) = delete;
  DeviceFactors& operator=(const DeviceFactors&) = delete;

  // Device, [layers][query_heads]: upper bounds of ||v L_h|| / ||v||, for the plain factor and for the rounded image; 0 in layers without projection.
  const float* singular() const { return singular_; }
  FactorView view() const { return view_; }
  lpx_dtype precision() const { return precision_; }
  bool has(int layer) const { return slots_[static_cast<size_t>(layer)] >= 0; }
  // Every layer has a projection.
  bool complete() const { return complete_; }
  int64_t bytes() const { return bytes_; }

 private:
  template <typename T>
  T* allocate(int64_t count);
  void release() noexcept;
  void build(const Launch& launch, const ModelShape& model);

  lpx_dtype precision_;
  std::vector<int32_t> slots_;
  bool complete_ = true;
  std::vector<void*> owned_;
  int64_t bytes_ = 0;
  float* singular_ = nullptr;
  FactorView view_ = {};
};

}  // namespace laprox::cuda
