#include <vector>

#include "cuda/model.hpp"

namespace laprox::cuda {

Model::Model(const Device& device, const lpx_model_desc* desc, const lpx_call& call) : device_(device), shape_(desc) {
  const Launch launch = device.launch(call.stream);
  factors_ = std::make_unique<DeviceFactors>(launch, shape_, shape_.projection_dtype);
  std::vector<float> sinks;
  for (const Layer& layer : shape_.layers) {
    sinks.insert(sinks.end(), layer.sink_logits.begin(), layer.sink_logits.end());
    sinks.resize(sinks.size() + static_cast<size_t>(shape_.query_heads) - layer.sink_logits.size(), 0.0f);
  }
  sinks_ = Buffer<float>(static_cast<int64_t>(sinks.size()));
  check(cudaMemcpyAsync(sinks_.data(), sinks.data(), sinks.size() * sizeof(float), cudaMemcpyHostToDevice, launch.stream), "sink logits");
  check(cudaStreamSynchronize(launch.stream), "creating a model");
}

const float* Model::sink_logits(int layer) const {
  return shape_.layers[static_cast<size_t>(layer)].sink_logits.empty() ? nullptr : sinks_.data() + int64_t{layer} * shape_.query_heads;
}

}  // namespace laprox::cuda
