// One JavaScript environment (the main thread, or a worker): its error class, its devices, and the one way that other
// threads have to reach it.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "addon/failure.hpp"
#include "napi.h"

namespace laprox::addon {

class Device;
class Job;

// What a dispatcher thread has to tell the JavaScript thread.
struct Event {
  enum Kind { kFinished, kProgress, kEnded } kind;
  Job* job;        // finished: owned by the event
  Device* device;  // ended: its thread can be joined
};

class Environment {
 public:
  explicit Environment(Napi::Env env);
  ~Environment();
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

  // The environment of a call of one of the addon's functions.
  static Environment& of(const Napi::CallbackInfo& info) { return *static_cast<Environment*>(info.Data()); }

  void set_error_class(Napi::Function error_class);
  // A LaproxError, or null where the environment can run no JavaScript any more.
  napi_value error(const Failure& failure) noexcept;

  // Starts a device's thread.
  std::shared_ptr<Device> add(const lpx_device_options& options);
  // The event loop stays alive from begin to end of a job.
  void begin_job();
  void end_job() noexcept;

  // From any thread.
  void post(Event event) noexcept;
  // Stops and joins every dispatcher thread. Nothing is posted or delivered any more.
  void stop() noexcept;

 private:
  static void drain(napi_env env, napi_value, void* context, void*);
  static void clean_up(void* environment);

  napi_env env_;
  napi_ref error_class_ = nullptr;
  napi_threadsafe_function wake_ = nullptr;
  std::vector<std::shared_ptr<Device>> devices_;
  int64_t jobs_ = 0;

  std::mutex mutex_;
  std::vector<Event> events_;
  bool stopped_ = false;
  std::vector<Event> draining_;  // JavaScript thread only; kept for its capacity
};

}  // namespace laprox::addon
