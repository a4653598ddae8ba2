// One call: decoded on the JavaScript thread, run on its device's thread (or, where that is not worth it, at once), settled on
// the JavaScript thread.
#pragma once

#include <atomic>
#include <chrono>
#include <exception>
#include <memory>

#include "addon/arguments.hpp"
#include "addon/device.hpp"

namespace laprox::addon {

// Where the typed arrays begin in `held`.
inline constexpr uint32_t kFirstBuffer = 3;

class Job {
 public:
  // `held` is [result, progress function, abort flag, ...typed arrays]: see lib/native.ts. It is referenced until the job
  // is settled, and with it every buffer that native code uses.
  Job(std::shared_ptr<Device> device, Napi::Value held);
  virtual ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // JavaScript thread: the promise of held[0], once.
  Napi::Value promise();
  Device& device() const { return *device_; }
  const std::shared_ptr<Device>& shared_device() const { return device_; }
  // Calls of a device are numbered as they come.
  int64_t number() const { return number_; }
  void number(int64_t number) { number_ = number; }

  // Device thread. kPending: the work is on a stream, and whoever sees its end posts the job, which may be gone by now.
  enum Outcome { kDone, kPending };
  virtual Outcome execute() noexcept;
  // Device thread: waits for work that is on a stream.
  virtual void wait() noexcept {}
  // Whether the work takes at most some 20 µs, which is less than it takes to wake the device's thread and to be woken by it. The
  // JavaScript thread may do it then.
  virtual bool brief() const { return false; }
  // JavaScript thread: fulfils or rejects the promise, once, and reports progress.
  void settle() noexcept;
  void deliver_progress() noexcept;
  // JavaScript thread: rejects the promise of an aborted call whose work runs out by itself.
  virtual void abandon() noexcept {}

  // Any thread.
  bool aborted() const { return abort_flag_ != nullptr && abort_flag_->load(std::memory_order_relaxed) != 0; }

 protected:
  // The work. A status other than LPX_OK has its sentence in lpx_last_error; a Failure is as good.
  virtual lpx_status run() = 0;
  // Whether the work changes what it was given, and so is told as done once it is, whatever was aborted meanwhile.
  virtual bool changes_inputs() const { return false; }
  // JavaScript thread, before a promise is fulfilled: last results. `held` is the call's. May throw.
  virtual void deliver(Napi::Array) {}

  void fail_with(std::exception_ptr thrown) { thrown_ = std::move(thrown); }
  bool failed() const { return thrown_ != nullptr; }
  void reject(const Failure& failure) noexcept;
  napi_env env() const { return env_; }
  bool cancelled() const { return device_->cancelled() || aborted(); }

  // The next numbers, with the buffers that belong to them.
  Section section(Napi::Value numbers) {
    Section result(numbers, buffers_, next_buffer_, device_->cuda());
    section_buffers_ = next_buffer_;
    return result;
  }
  // The next buffer after those of the sections: outputs that nobody else knows before the call is settled.
  const Buffer& next_buffer();
  // The last argument of the C ABI's calls: progress and cancellation.
  const lpx_call* call() const { return &call_; }

 private:
  static int on_progress(void* job, int64_t done, int64_t total) noexcept;

  const std::shared_ptr<Device> device_;
  const napi_env env_;
  int64_t number_ = 0;
  napi_ref held_ = nullptr;
  napi_deferred deferred_ = nullptr;
  const Buffers buffers_;
  size_t next_buffer_ = 0;
  size_t section_buffers_ = 0;
  std::atomic<int32_t>* abort_flag_ = nullptr;
  lpx_call call_{};

  bool reports_progress_ = false;
  std::chrono::steady_clock::time_point next_report_;
  std::atomic<bool> report_on_its_way_ = false;
  std::atomic<double> done_ = 0;

  std::exception_ptr thrown_;  // null: it worked
};

// Queues a job, or runs a brief one where it has no other to wait for, and returns its promise.
Napi::Value submit(std::unique_ptr<Job> job);

}  // namespace laprox::addon
