#include "addon/device.hpp"

#include <algorithm>

#include "addon/arguments.hpp"
#include "addon/handle.hpp"
#include "addon/job.hpp"

namespace laprox::addon {
Device::Device(Environment& environment, const lpx_device_options& options)
    : environment_(environment), options_(options), thread_(&Device::work, this) {}

Device::~Device() {
  dispose();
  join();
}

void Device::submit(std::unique_ptr<Job> job) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (disposed()) fail("DISPOSED", "the device was used after its disposal");
    queue_.push_back(std::move(job));
  }
  environment_.begin_job();
  changed_.notify_one();
}

void Device::sweep() {
  std::vector<Job*> aborted;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& job : queue_)
      if (job->aborted()) aborted.push_back(job.release());
    std::erase(queue_, nullptr);
  }
  for (Job* job : aborted) {
    job->execute();  // notices, and does nothing
    environment_.post({Event::kFinished, job, nullptr});
  }
}

void Device::dispose() noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    disposed_ = true;
  }
  changed_.notify_one();
}

void Device::cancel() noexcept {
  cancelled_.store(true, std::memory_order_relaxed);
  dispose();
}

void Device::join() noexcept {
  if (thread_.joinable()) thread_.join();
}

void Device::discard(lpx_model* model) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!ended_) {
      discarded_.push_back(model);
      model = nullptr;
    }
  } catch (const std::bad_alloc&) {}
  if (model != nullptr) lpx_model_destroy(model);
  changed_.notify_one();
}

lpx_status Device::open() {
  const lpx_status opened = lpx_device_open(&options_, &handle_);
  if (opened != LPX_OK) {
    dispose();
    return opened;
  }
  info_.size = sizeof info_;
  return lpx_get_device_info(handle_, &info_);
}

void Device::work() noexcept {
  std::vector<lpx_model*> discarded;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return disposed() || !queue_.empty() || !discarded_.empty(); });
    discarded.swap(discarded_);
    std::unique_ptr<Job> job;
    if (!queue_.empty()) {
      job = std::move(queue_.front());
      queue_.pop_front();
    }
    const bool ending = disposed() && job == nullptr && discarded.empty();
    if (ending) break;
    lock.unlock();
    for (lpx_model* model : discarded) lpx_model_destroy(model);
    discarded.clear();
    if (job != nullptr) {
      job->execute();
      environment_.post({Event::kFinished, job.release(), nullptr});
    }
    lock.lock();
  }
  ended_ = true;
  lock.unlock();
  lpx_device_close(handle_);
  environment_.post({Event::kEnded, nullptr, this});
}

namespace {

class OpenJob : public Job {
 public:
  OpenJob(std::shared_ptr<Device> device, Napi::Value held) : Job(std::move(device), held) {}
  lpx_status run() override { return device().open(); }
};

}  // namespace

// (backend, index, threads, isa, held); held[0] becomes the device's handle.
Napi::Value open_device(const Napi::CallbackInfo& info) {
  lpx_device_options options{};
  options.size = sizeof options;
  options.backend = static_cast<lpx_backend>(info[0].As<Napi::Number>().Int32Value());
  options.index = info[1].As<Napi::Number>().Int32Value();
  options.threads = info[2].As<Napi::Number>().Int32Value();
  options.isa = static_cast<lpx_isa>(info[3].As<Napi::Number>().Int32Value());
  const std::shared_ptr<Device> device = Environment::of(info).add(options);
  wrap(info[4].As<Napi::Array>().Get(0u).As<Napi::Object>(), device);
  return submit(std::make_unique<OpenJob>(device, info[4]));
}

// (device)
Napi::Value close_device(const Napi::CallbackInfo& info) {
  owner_of<Device>(info[0])->dispose();
  return info.Env().Undefined();
}

// (device) -> [backend, index, threads, memoryBytes, name, isa]
Napi::Value device_info(const Napi::CallbackInfo& info) {
  const lpx_device_info& from = unwrap<Device>(info[0])->info();
  Napi::Array result = Napi::Array::New(info.Env(), 6);
  result[0u] = Napi::Number::New(info.Env(), from.backend);
  result[1u] = Napi::Number::New(info.Env(), from.index);
  result[2u] = Napi::Number::New(info.Env(), from.threads);
  result[3u] = Napi::Number::New(info.Env(), static_cast<double>(from.memory_bytes));
  result[4u] = Napi::String::New(info.Env(), from.name);
  result[5u] = Napi::String::New(info.Env(), from.isa);
  return result;
}

// (backend) -> [available, deviceCount, code, reason]
Napi::Value backend_info(const Napi::CallbackInfo& info) {
  lpx_backend_info from{};
  from.size = sizeof from;
  check(lpx_get_backend_info(static_cast<lpx_backend>(info[0].As<Napi::Number>().Int32Value()), &from));
  Napi::Array result = Napi::Array::New(info.Env(), 4);
  result[0u] = Napi::Boolean::New(info.Env(), from.available != 0);
  result[1u] = Napi::Number::New(info.Env(), from.device_count);
  result[2u] = Napi::String::New(info.Env(), from.code);
  result[3u] = Napi::String::New(info.Env(), from.reason);
  return result;
}

// (device)
Napi::Value sweep(const Napi::CallbackInfo& info) {
  owner_of<Device>(info[0])->sweep();
  return info.Env().Undefined();
}

}  // namespace laprox::addon
