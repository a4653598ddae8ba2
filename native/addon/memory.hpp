// Memory of a device that JavaScript holds.
#pragma once

#include "addon/device.hpp"

namespace laprox::addon {

class Memory {
 public:
  static constexpr napi_type_tag kTag = {0x52b7c0e3f1a94d68, 0x8d1f6e2ab9475c03};
  static constexpr const char* kName = "memory";

  Memory(std::shared_ptr<Device> device, lpx_memory kind) : device_(std::move(device)), kind_(kind) {}
  // Once no call that was there before can be using it.
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  // Device thread.
  std::byte* allocate(int64_t bytes, void* stream);
  std::byte* data() const { return data_; }
  // What a handle needs: see handle.hpp.
  void dispose() noexcept {}
  bool disposed() const { return false; }

 private:
  const std::shared_ptr<Device> device_;
  const lpx_memory kind_;
  std::shared_ptr<Opened> opened_;
  std::byte* data_ = nullptr;
};

Napi::Value allocate_memory(const Napi::CallbackInfo& info);
Napi::Value free_memory(const Napi::CallbackInfo& info);
Napi::Value upload(const Napi::CallbackInfo& info);
Napi::Value download(const Napi::CallbackInfo& info);
Napi::Value settle(const Napi::CallbackInfo& info);

}  // namespace laprox::addon
