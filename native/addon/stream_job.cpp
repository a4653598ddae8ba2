#include "addon/stream_job.hpp"

namespace laprox::addon {

StreamJob::StreamJob(std::shared_ptr<Device> device, Napi::Value held, Napi::Value streams, const char* name)
    : Job(std::move(device), held), name_(name), exchange_(this->device()) {
  const Buffer numbers = buffer_of(env(), streams);
  const double* at = elements<double>(numbers, 0, 3);
  const auto handle = [](double number) { return pointer_to<void>(static_cast<int64_t>(number)); };
  stream_ = handle(at[0]);
  wait_for_ = handle(at[1]);
  record_ = handle(at[2]);
}

Job::Outcome StreamJob::execute() noexcept {
  try {
    if (cancelled()) fail("ABORTED", "the call was aborted before it began");
    if (device().lost()) throw Failure("DEVICE_ERROR", "the device is lost: " + device().why_lost());
  } catch (...) {
    fail_with(std::current_exception());
    return kDone;
  }
  try {
    if (wait_for_ != nullptr) check(lpx_wait_event(handle(), stream_, wait_for_));
    enqueue();
    if (record_ != nullptr) check(lpx_record_event(handle(), stream_, record_));
  } catch (...) {
    exchange_.drop(stream_);
    fail_with(std::current_exception());
    const Failure failure = failure_of(std::current_exception());
    if (std::strcmp(failure.code(), "DEVICE_ERROR") == 0) fail_with(std::make_exception_ptr(device_failure(failure.what())));
  }
  // Work that is on the stream uses this job's memory, also where the rest of it was refused.
  on_stream_ = true;
  if (!device().lost() && lpx_notify(handle(), stream_, on_end, this) == LPX_OK) return kPending;
  on_stream_ = false;
  if (!failed()) fail_with(std::make_exception_ptr(device_failure(lpx_last_error())));
  static_cast<void>(lpx_synchronize(handle(), stream_));
  return kDone;
}

void StreamJob::wait() noexcept {
  if (on_stream_) static_cast<void>(lpx_synchronize(handle(), stream_));
}

void StreamJob::abandon() noexcept {
  if (!changes_inputs()) reject({"ABORTED", "the call was aborted; its work on the device runs to its end"});
}

void StreamJob::on_end(void* job) {
  StreamJob& self = *static_cast<StreamJob*>(job);
  self.device().environment().post({Event::kFinished, &self, nullptr});
}

lpx_call StreamJob::stream_call() const {
  lpx_call call{};
  call.size = sizeof call;
  call.stream = stream_;
  call.status = exchange_.device_status();
  return call;
}

void StreamJob::deliver(Napi::Array held) {
  const int32_t status = exchange_.status();
  if (status == Exchange::kNothing) throw device_failure("its results did not arrive");
  if (status != LPX_OK) throw Failure(code_of(static_cast<lpx_status>(status)), explain(static_cast<lpx_status>(status)));
  finish(held);
}

std::string StreamJob::explain(lpx_status status) const { return std::string(name_) + ": the device reported " + lpx_status_name(status); }

Failure StreamJob::device_failure(const std::string& message) {
  const bool usable = lpx_check_device(handle()) == LPX_OK;
  const std::string why = usable ? message : lpx_last_error();
  if (!usable) device().lose(why.c_str());
  return {"DEVICE_ERROR", std::string(name_) + ": " + why + (usable ? "" : "; the device is lost: open it again in a new process")};
}

}  // namespace laprox::addon
