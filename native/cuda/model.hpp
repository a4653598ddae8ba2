// A model on a GPU: its shape, the factors of its projections, its sink logits.
#pragma once

#include <memory>

#include "core/model.hpp"
#include "cuda/device.hpp"
#include "cuda/launch/factors.hpp"

namespace laprox::cuda {

class Model {
 public:
  Model(const Device& device, const lpx_model_desc* desc, const lpx_call& call);

  const Device& device() const { return device_; }
  const ModelShape& shape() const { return shape_; }
  const DeviceFactors& factors() const { return *factors_; }
  // [query_heads] on the device; null: none.
  const float* sink_logits(int layer) const;

 private:
  const Device& device_;
  ModelShape shape_;
  std::unique_ptr<DeviceFactors> factors_;
  Buffer<float> sinks_;  // [layers][query_heads]
};

}  // namespace laprox::cuda
