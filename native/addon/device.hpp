// A device and the thread that its calls run on, one after the other in the order they came.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "addon/environment.hpp"

namespace laprox::addon {

class Device {
 public:
  static constexpr napi_type_tag kTag = {0x7ef1a4c2b05d4e10, 0x9a6c31d84f2e7b01};
  static constexpr const char* kName = "device";

  Device(Environment& environment, const lpx_device_options& options);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // JavaScript thread.
  void submit(std::unique_ptr<Job> job);
  // Ends queued jobs whose caller has aborted them.
  void sweep();
  // Takes no more jobs; those that were taken run to their end, then the device closes.
  void dispose() noexcept;
  // Ends all jobs as soon as they notice.
  void cancel() noexcept;
  void join() noexcept;
  bool disposed() const { return disposed_.load(std::memory_order_relaxed); }

  // Destroys a model where no call can be in its way: on this device's thread.
  void discard(lpx_model* model) noexcept;
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }
  Environment& environment() { return environment_; }

  // On this device's thread.
  lpx_status open();
  lpx_device* handle() const { return handle_; }
  // Once the promise of opening has been fulfilled.
  const lpx_device_info& info() const { return info_; }

 private:
  void work() noexcept;

  Environment& environment_;
  const lpx_device_options options_;
  lpx_device_info info_{};
  lpx_device* handle_ = nullptr;
  std::atomic<bool> cancelled_ = false;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::unique_ptr<Job>> queue_;
  std::vector<lpx_model*> discarded_;
  std::atomic<bool> disposed_ = false;
  bool ended_ = false;
  std::thread thread_;
};

Napi::Value open_device(const Napi::CallbackInfo& info);
Napi::Value close_device(const Napi::CallbackInfo& info);
Napi::Value device_info(const Napi::CallbackInfo& info);
Napi::Value backend_info(const Napi::CallbackInfo& info);
Napi::Value sweep(const Napi::CallbackInfo& info);

}  // namespace laprox::addon
