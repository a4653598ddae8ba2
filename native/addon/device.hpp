// A device and the thread that its calls run on, one after the other in the order they came.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "addon/environment.hpp"

namespace laprox::addon {

// A device of the C ABI, open until the last that uses it lets go: its thread, or memory of it that JavaScript still holds.
struct Opened {
  explicit Opened(lpx_device* device) : handle(device) {}
  ~Opened() { lpx_device_close(handle); }
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;

  lpx_device* const handle;
};

// Page-locked memory of the host.
struct Pinned {
  std::byte* data;
  int64_t bytes;
};

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
  // Runs a job here and now, where that is its turn: no call of this device is under way.
  bool execute_now(Job& job);
  // Ends queued jobs whose caller has aborted them, and settles those on a stream, whose work runs out by itself.
  void sweep();
  // Takes no more jobs; those that were taken run to their end, then the device closes.
  void dispose() noexcept;
  // Ends all jobs as soon as they notice.
  void cancel() noexcept;
  void join() noexcept;
  bool disposed() const { return disposed_.load(std::memory_order_relaxed); }

  // A call is over and its job gone: what waited for it can be freed.
  void finished(int64_t serial) noexcept;
  // An error has made the device unusable; why.
  bool lost() const;
  std::string why_lost() const;
  void lose(const char* why) noexcept;

  // Destroys a model where no call can be in its way: on this device's thread.
  void discard(lpx_model* model) noexcept;
  // Frees memory once no call that was there before can be using it.
  void discard(const std::shared_ptr<Opened>& opened, lpx_memory kind, void* memory) noexcept;
  // Memory to exchange numbers with a GPU, kept for the next call. Any thread; `take` throws where there is none.
  Pinned take(int64_t bytes);
  void give(const std::shared_ptr<Opened>& opened, Pinned memory) noexcept;
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }
  Environment& environment() { return environment_; }

  // On this device's thread.
  lpx_status open();
  lpx_device* handle() const { return opened_->handle; }
  const std::shared_ptr<Opened>& opened() const { return opened_; }
  // Any thread.
  bool cuda() const { return options_.backend == LPX_CUDA; }
  // Once the promise of opening has been fulfilled.
  const lpx_device_info& info() const { return info_; }

 private:
  struct Discarded {
    int64_t after;  // the serial number of the last call that may use it
    std::shared_ptr<Opened> opened;
    lpx_memory kind;
    void* memory;
  };

  void work() noexcept;
  // Holding the mutex: takes what nothing uses any more.
  std::vector<Discarded> unused();

  Environment& environment_;
  const lpx_device_options options_;
  lpx_device_info info_{};
  std::shared_ptr<Opened> opened_;
  std::atomic<bool> cancelled_ = false;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::unique_ptr<Job>> queue_;
  int64_t last_serial_ = 0;
  std::map<int64_t, Job*> unfinished_;  // queued, running, or on a stream
  std::vector<lpx_model*> discarded_;
  std::vector<Discarded> discarded_memory_;
  std::vector<Pinned> pinned_;
  std::string lost_;
  std::atomic<bool> disposed_ = false;
  bool ended_ = false;
  std::thread thread_;
};

Napi::Value open_device(const Napi::CallbackInfo& info);
Napi::Value close_device(const Napi::CallbackInfo& info);
Napi::Value device_lost(const Napi::CallbackInfo& info);
Napi::Value device_info(const Napi::CallbackInfo& info);
Napi::Value backend_info(const Napi::CallbackInfo& info);
Napi::Value sweep(const Napi::CallbackInfo& info);

}  // namespace laprox::addon
