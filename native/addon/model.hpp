// A model: its factors are made by the first job of its life, and calls after that one find them.
#pragma once

#include <memory>

#include "addon/device.hpp"

namespace laprox::addon {

class Model {
 public:
  static constexpr napi_type_tag kTag = {0x1c58e7b9d2a04f36, 0xb3e0947c6a15f802};
  static constexpr const char* kName = "model";

  Model(Napi::Env env, std::shared_ptr<Device> device, int64_t bytes);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // JavaScript thread. The memory goes with the last job that uses it.
  void dispose() noexcept;
  bool disposed() const { return disposed_; }
  const std::shared_ptr<Device>& device() const { return device_; }

  // Device thread.
  lpx_status create(const lpx_model_desc& desc, const lpx_call* call);
  void fail(lpx_status status, std::string message);
  // Throws what creating the model threw.
  lpx_model* handle() const;

 private:
  const napi_env env_;
  const std::shared_ptr<Device> device_;
  const int64_t bytes_;
  bool disposed_ = false;
  lpx_model* handle_ = nullptr;
  lpx_status status_ = LPX_INTERNAL;
  std::string message_ = "the model's creation did not end";
};

Napi::Value create_model(const Napi::CallbackInfo& info);
Napi::Value close_model(const Napi::CallbackInfo& info);

}  // namespace laprox::addon
