#include "addon/job.hpp"

namespace laprox::addon {
namespace {

constexpr uint32_t kResult = 0;
constexpr uint32_t kProgress = 1;
constexpr uint32_t kAbortFlag = 2;

constexpr auto kReportEvery = std::chrono::milliseconds(50);

}  // namespace

Job::Job(std::shared_ptr<Device> device, Napi::Value held) : device_(std::move(device)), env_(held.Env()), buffers_(held, kFirstBuffer) {
  if (device_->disposed()) fail("DISPOSED", "the device was used after its disposal");
  if (device_->lost()) throw Failure("DEVICE_ERROR", "the device is lost: " + device_->why_lost());
  call_.size = sizeof call_;
  call_.progress = on_progress;
  call_.user = this;
  napi_value progress, flag;
  napi_valuetype type;
  if (napi_get_element(env_, held, kProgress, &progress) == napi_ok && napi_typeof(env_, progress, &type) == napi_ok && type == napi_function) {
    reports_progress_ = true;
    next_report_ = std::chrono::steady_clock::now() + kReportEvery;
  }
  if (napi_get_element(env_, held, kAbortFlag, &flag) == napi_ok) {
    const Buffer buffer = buffer_of(env_, flag);
    if (buffer.bytes >= 4) abort_flag_ = reinterpret_cast<std::atomic<int32_t>*>(buffer.data);
  }
  if (napi_create_reference(env_, held, 1, &held_) != napi_ok) throw Napi::Error::New(env_);
}

Job::~Job() {
  if (held_ != nullptr) napi_delete_reference(env_, held_);
}

const Buffer& Job::next_buffer() {
  if (next_buffer_ == buffers_.count()) fail("INVALID_ARGUMENT", "the call has %zu buffers; expected more", next_buffer_);
  return buffers_[next_buffer_++];
}

Napi::Value Job::promise() {
  napi_value promise;
  if (napi_create_promise(env_, &deferred_, &promise) != napi_ok) throw Napi::Error::New(env_);
  return {env_, promise};
}

Job::Outcome Job::execute() noexcept {
  try {
    if (cancelled()) fail("ABORTED", "the call was aborted before it began");
    check(run());
  } catch (...) { thrown_ = std::current_exception(); }
  return kDone;
}

// From here on the environment may be ending: statuses are looked at, but nothing is thrown.
void Job::settle() noexcept {
  napi_value held, value;
  if (deferred_ == nullptr || napi_get_reference_value(env_, held_, &held) != napi_ok) return;
  // Work may have been too quick for its abort: callers need not ask which came first.
  if (thrown_ == nullptr && aborted() && !changes_inputs())
    thrown_ = std::make_exception_ptr(Failure("ABORTED", "the call was aborted; its work was done by then, and is let go of"));
  if (thrown_ == nullptr && !buffers_.attached(env_, held, section_buffers_))
    thrown_ = std::make_exception_ptr(
        Failure("DETACHED", "a buffer of the call was detached (it was transferred elsewhere) while the call ran; its results are not valid"));
  if (thrown_ == nullptr) {
    try {
      deliver(Napi::Array(env_, held));
    } catch (const Napi::Error& error) { thrown_ = std::make_exception_ptr(Failure("INTERNAL", error.Message())); } catch (...) {
      thrown_ = std::current_exception();
    }
  }
  if (thrown_ == nullptr) {
    if (napi_get_element(env_, held, kResult, &value) == napi_ok) napi_resolve_deferred(env_, deferred_, value);
    deferred_ = nullptr;
  } else {
    reject(failure_of(thrown_));
  }
}

void Job::reject(const Failure& failure) noexcept {
  if (deferred_ == nullptr) return;
  const napi_value error = device_->environment().error(failure);
  if (error != nullptr) napi_reject_deferred(env_, deferred_, error);
  deferred_ = nullptr;
}

void Job::deliver_progress() noexcept {
  report_on_its_way_.store(false, std::memory_order_relaxed);
  napi_value held, progress, receiver, done;
  if (napi_get_reference_value(env_, held_, &held) == napi_ok && napi_get_element(env_, held, kProgress, &progress) == napi_ok &&
      napi_get_undefined(env_, &receiver) == napi_ok && napi_create_double(env_, done_.load(std::memory_order_relaxed), &done) == napi_ok)
    napi_call_function(env_, receiver, progress, 1, &done, nullptr);
}

int Job::on_progress(void* job, int64_t done, int64_t total) noexcept {
  Job& self = *static_cast<Job*>(job);
  if (self.reports_progress_ && total > 0) {
    const auto now = std::chrono::steady_clock::now();
    if (now >= self.next_report_ && !self.report_on_its_way_.exchange(true, std::memory_order_relaxed)) {
      self.next_report_ = now + kReportEvery;
      self.done_.store(static_cast<double>(done) / static_cast<double>(total), std::memory_order_relaxed);
      self.device_->environment().post({Event::kProgress, &self, nullptr});
    }
  }
  return self.cancelled() ? 1 : 0;
}

Napi::Value submit(std::unique_ptr<Job> job) {
  const Napi::Value promise = job->promise();
  Device& device = job->device();
  if (job->brief() && device.execute_now(*job))
    job->settle();
  else
    device.submit(std::move(job));
  return promise;
}

}  // namespace laprox::addon
