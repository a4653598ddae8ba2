#include "addon/device.hpp"

#include <algorithm>
#include <bit>
#include <iterator>

#include "addon/arguments.hpp"
#include "addon/handle.hpp"
#include "addon/job.hpp"

namespace laprox::addon {
namespace {

constexpr int64_t kSmallestPinned = 1 << 14;
constexpr int64_t kLargestKept = 1 << 22;

}  // namespace

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
    job->number(++last_serial_);
    unfinished_.emplace(last_serial_, job.get());
    queue_.push_back(std::move(job));
  }
  environment_.begin_job();
  changed_.notify_one();
}

bool Device::execute_now(Job& job) {
  // What is not under way cannot begin meanwhile: the device's thread needs the mutex for that.
  const std::lock_guard<std::mutex> lock(mutex_);
  if (disposed() || !unfinished_.empty()) return false;
  job.execute();
  return true;
}

void Device::sweep() {
  std::vector<Job*> aborted;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& job : queue_)
      if (job->aborted()) aborted.push_back(job.release());
    std::erase(queue_, nullptr);
    // What is no longer in the queue runs, or is on a stream.
    for (const auto& [serial, job] : unfinished_)
      if (job->aborted() && std::find(aborted.begin(), aborted.end(), job) == aborted.end()) job->abandon();
  }
  for (Job* job : aborted) {
    job->execute();  // notices, and does nothing
    environment_.post({Event::kFinished, job, nullptr});
  }
}

void Device::finished(int64_t serial) noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    unfinished_.erase(serial);
    if (discarded_memory_.empty() && !disposed()) return;  // nothing waits for that: waking the thread costs microseconds
  }
  changed_.notify_one();
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

bool Device::lost() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return !lost_.empty();
}

std::string Device::why_lost() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lost_;
}

void Device::lose(const char* why) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (lost_.empty()) lost_ = why;
  } catch (const std::bad_alloc&) {}
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

void Device::discard(const std::shared_ptr<Opened>& opened, lpx_memory kind, void* memory) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!ended_) {
      discarded_memory_.push_back({last_serial_, opened, kind, memory});
      memory = nullptr;
    }
  } catch (const std::bad_alloc&) {}
  if (memory != nullptr) lpx_free(opened->handle, kind, memory, nullptr);
  changed_.notify_one();
}

std::vector<Device::Discarded> Device::unused() {
  const int64_t oldest = unfinished_.empty() ? INT64_MAX : unfinished_.begin()->first;
  const auto used = [oldest](const Discarded& memory) { return memory.after >= oldest; };
  // Serial numbers only grow: what is used stands behind what is not.
  const auto begin = discarded_memory_.begin();
  const auto end = std::find_if(begin, discarded_memory_.end(), used);
  std::vector<Discarded> result(std::make_move_iterator(begin), std::make_move_iterator(end));
  discarded_memory_.erase(begin, end);
  return result;
}

Pinned Device::take(int64_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Pinned& memory : pinned_) {
      if (memory.bytes < bytes || memory.bytes / 4 > bytes + kSmallestPinned) continue;
      const Pinned taken = memory;
      memory = pinned_.back();
      pinned_.pop_back();
      return taken;
    }
  }
  const int64_t rounded = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(bytes, kSmallestPinned))));
  void* memory = nullptr;
  check(lpx_allocate(handle(), LPX_MEMORY_HOST, rounded, nullptr, &memory));
  return {static_cast<std::byte*>(memory), rounded};
}

void Device::give(const std::shared_ptr<Opened>& opened, Pinned memory) noexcept {
  if (memory.data == nullptr) return;
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!ended_ && memory.bytes <= kLargestKept) {
      pinned_.push_back(memory);
      return;
    }
  } catch (const std::bad_alloc&) {}
  discard(opened, LPX_MEMORY_HOST, memory.data);
}

lpx_status Device::open() {
  lpx_device* handle = nullptr;
  const lpx_status opened = lpx_device_open(&options_, &handle);
  if (opened != LPX_OK) {
    dispose();
    return opened;
  }
  opened_ = std::make_shared<Opened>(handle);
  info_.size = sizeof info_;
  return lpx_get_device_info(handle, &info_);
}

void Device::work() noexcept {
  std::vector<lpx_model*> discarded;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    std::vector<Discarded> memory;
    changed_.wait(lock, [&] {
      memory = unused();
      return (disposed() && (unfinished_.empty() || cancelled())) || !queue_.empty() || !discarded_.empty() || !memory.empty();
    });
    discarded.swap(discarded_);
    std::unique_ptr<Job> job;
    if (!queue_.empty()) {
      job = std::move(queue_.front());
      queue_.pop_front();
    }
    const bool ending = disposed() && job == nullptr && discarded.empty() && memory.empty();
    if (ending) break;
    lock.unlock();
    for (lpx_model* model : discarded) lpx_model_destroy(model);
    discarded.clear();
    for (const Discarded& unused : memory) lpx_free(unused.opened->handle, unused.kind, unused.memory, nullptr);
    if (job != nullptr) {
      Job* running = job.release();
      // One that is on a stream posts itself when the stream gets there, which may be at once.
      if (running->execute() == Job::kDone) environment_.post({Event::kFinished, running, nullptr});
    }
    lock.lock();
  }
  // Nobody will hear of them, but they must not write any more.
  for (const auto& [serial, job] : unfinished_) job->wait();
  ended_ = true;
  std::vector<Discarded> memory;
  memory.swap(discarded_memory_);
  for (const Pinned& pinned : pinned_) memory.push_back({0, opened_, LPX_MEMORY_HOST, pinned.data});
  pinned_.clear();
  lock.unlock();
  for (const Discarded& last : memory) lpx_free(last.opened->handle, last.kind, last.memory, nullptr);
  memory.clear();
  opened_.reset();
  environment_.post({Event::kEnded, nullptr, this});
}

namespace {

class OpenJob : public Job {
 public:
  OpenJob(std::shared_ptr<Device> device, Napi::Value held) : Job(std::move(device), held) {}
  lpx_status run() override { return device().open(); }
};

}  // namespace

// (backend, index, threads, isa, kernels, held); held[0] becomes the device's handle.
Napi::Value open_device(const Napi::CallbackInfo& info) {
  lpx_device_options options{};
  options.size = sizeof options;
  options.backend = static_cast<lpx_backend>(info[0].As<Napi::Number>().Int32Value());
  options.index = info[1].As<Napi::Number>().Int32Value();
  options.threads = info[2].As<Napi::Number>().Int32Value();
  options.isa = static_cast<lpx_isa>(info[3].As<Napi::Number>().Int32Value());
  options.kernels = static_cast<lpx_kernels>(info[4].As<Napi::Number>().Int32Value());
  const std::shared_ptr<Device> device = Environment::of(info).add(options);
  wrap(info[5].As<Napi::Array>().Get(0u).As<Napi::Object>(), device);
  return submit(std::make_unique<OpenJob>(device, info[5]));
}

// (device)
Napi::Value close_device(const Napi::CallbackInfo& info) {
  owner_of<Device>(info[0])->dispose();
  return info.Env().Undefined();
}

// (device) -> why it is lost; "" where it is not
Napi::Value device_lost(const Napi::CallbackInfo& info) {
  const std::shared_ptr<Device>& device = owner_of<Device>(info[0]);
  return Napi::String::New(info.Env(), device == nullptr ? "" : device->why_lost());
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
