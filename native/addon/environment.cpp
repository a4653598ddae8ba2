#include "addon/environment.hpp"

#include <algorithm>

#include "addon/device.hpp"
#include "addon/job.hpp"

namespace laprox::addon {
namespace {

// Environments whose threads run. process.exit() ends a process without cleaning its main environment up, and threads that
// compute while a library's static objects go would crash: the destructor of this one stops them first.
class Living {
 public:
  ~Living() {
    for (Environment* environment : environments_) environment->stop();
  }
  void add(Environment* environment) {
    const std::lock_guard<std::mutex> lock(mutex_);
    environments_.push_back(environment);
  }
  void remove(Environment* environment) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::erase(environments_, environment);
  }

 private:
  std::mutex mutex_;
  std::vector<Environment*> environments_;
};

Living living;

}  // namespace

Environment::Environment(Napi::Env env) : env_(env) {
  napi_value name = Napi::String::New(env, "laprox");
  napi_status status = napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this, drain, &wake_);
  if (status == napi_ok) status = napi_unref_threadsafe_function(env, wake_);
  // Hooks run last in, first out: this one before the threadsafe function's own.
  if (status == napi_ok) status = napi_add_env_cleanup_hook(env, clean_up, this);
  if (status != napi_ok) throw Napi::Error::New(env);
  living.add(this);
}

Environment::~Environment() { living.remove(this); }

void Environment::set_error_class(Napi::Function error_class) {
  if (error_class_ != nullptr) napi_delete_reference(env_, error_class_);
  error_class_ = nullptr;
  if (napi_create_reference(env_, error_class, 1, &error_class_) != napi_ok) throw Napi::Error::New(env_);
}

napi_value Environment::error(const Failure& failure) noexcept {
  napi_value error_class, arguments[2], error;
  if (error_class_ == nullptr || napi_get_reference_value(env_, error_class_, &error_class) != napi_ok ||
      napi_create_string_utf8(env_, failure.code(), NAPI_AUTO_LENGTH, &arguments[0]) != napi_ok ||
      napi_create_string_utf8(env_, failure.what(), NAPI_AUTO_LENGTH, &arguments[1]) != napi_ok ||
      napi_new_instance(env_, error_class, 2, arguments, &error) != napi_ok)
    return nullptr;
  return error;
}

std::shared_ptr<Device> Environment::add(const lpx_device_options& options) {
  // In this order nothing can fail once the thread runs, which has to be joined.
  devices_.reserve(devices_.size() + 1);
  devices_.push_back(std::make_shared<Device>(*this, options));
  return devices_.back();
}

void Environment::begin_job() {
  if (jobs_++ == 0) napi_ref_threadsafe_function(env_, wake_);
}

void Environment::end_job() noexcept {
  if (--jobs_ == 0) napi_unref_threadsafe_function(env_, wake_);
}

void Environment::post(Event event) noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool awake = !events_.empty();
    events_.push_back(event);
    if (awake || stopped_) return;
  }
  napi_call_threadsafe_function(wake_, nullptr, napi_tsfn_nonblocking);
}

void Environment::drain(napi_env env, napi_value, void* context, void*) {
  if (env == nullptr) return;  // the environment is going; so may be the context
  Environment& self = *static_cast<Environment*>(context);
  {
    const std::lock_guard<std::mutex> lock(self.mutex_);
    self.draining_.swap(self.events_);
  }
  for (const Event& event : self.draining_) {
    napi_handle_scope scope;
    if (napi_open_handle_scope(env, &scope) != napi_ok) scope = nullptr;
    switch (event.kind) {
      case Event::kFinished: {
        std::unique_ptr<Job> job(event.job);
        const std::shared_ptr<Device> device = job->shared_device();
        const int64_t serial = job->number();
        job->settle();
        job.reset();
        device->finished(serial);
        self.end_job();
        break;
      }
      case Event::kProgress: event.job->deliver_progress(); break;
      case Event::kEnded:
        event.device->join();
        std::erase_if(self.devices_, [&](const auto& device) { return device.get() == event.device; });
        break;
    }
    if (scope != nullptr) napi_close_handle_scope(env, scope);
  }
  self.draining_.clear();
}

void Environment::stop() noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }
  for (const auto& device : devices_) device->cancel();
  for (const auto& device : devices_) device->join();
}

void Environment::clean_up(void* environment) {
  Environment& self = *static_cast<Environment*>(environment);
  self.stop();
  living.remove(&self);
  self.devices_.clear();
  for (const Event& event : self.events_)
    if (event.kind == Event::kFinished) delete event.job;
  self.events_.clear();
  if (self.error_class_ != nullptr) napi_delete_reference(self.env_, self.error_class_);
  self.error_class_ = nullptr;
  napi_release_threadsafe_function(self.wake_, napi_tsfn_abort);
}

}  // namespace laprox::addon
