// laprox.node: what lib/native.ts imports.
#include "addon/compact.hpp"
#include "addon/device.hpp"
#include "addon/environment.hpp"
#include "addon/evict.hpp"
#include "addon/fidelity.hpp"
#include "addon/memory.hpp"
#include "addon/model.hpp"
#include "addon/pipeline.hpp"
#include "addon/score.hpp"
#include "addon/select.hpp"

namespace laprox::addon {
namespace {

// Raised with every change of the functions, their arguments or a section's numbers: lib/native.ts has the same number.
constexpr int kBindingVersion = 5;

// (LaproxError): the class that native errors are made of.
Napi::Value initialize(const Napi::CallbackInfo& info) {
  Environment::of(info).set_error_class(info[0].As<Napi::Function>());
  return info.Env().Undefined();
}

// Turns C++ exceptions into LaproxErrors.
template <Napi::Value (*body)(const Napi::CallbackInfo&)>
Napi::Value guarded(const Napi::CallbackInfo& info) {
  try {
    return body(info);
  } catch (const Napi::Error&) { throw; } catch (...) {
    const napi_value error = Environment::of(info).error(failure_of(std::current_exception()));
    if (error != nullptr) napi_throw(info.Env(), error);
    return {};
  }
}

template <Napi::Value (*body)(const Napi::CallbackInfo&)>
void add(Napi::Object exports, const char* name, Environment* environment) {
  exports.Set(name, Napi::Function::New<guarded<body>>(exports.Env(), name, environment));
}

Napi::Object load(Napi::Env env, Napi::Object exports) {
  auto owner = std::make_unique<Environment>(env);
  Environment* environment = owner.get();
  env.SetInstanceData(owner.release());
  exports.Set("abiVersion", Napi::Number::New(env, lpx_abi_version()));
  exports.Set("bindingVersion", Napi::Number::New(env, kBindingVersion));
  exports.Set("version", Napi::String::New(env, lpx_version()));
  add<initialize>(exports, "initialize", environment);
  add<backend_info>(exports, "backendInfo", environment);
  add<open_device>(exports, "openDevice", environment);
  add<close_device>(exports, "closeDevice", environment);
  add<device_lost>(exports, "deviceLost", environment);
  add<device_info>(exports, "deviceInfo", environment);
  add<sweep>(exports, "sweep", environment);
  add<create_model>(exports, "createModel", environment);
  add<close_model>(exports, "closeModel", environment);
  add<score>(exports, "score", environment);
  add<select>(exports, "select", environment);
  add<select_cache>(exports, "selectCache", environment);
  add<evict>(exports, "evict", environment);
  add<fidelity>(exports, "fidelity", environment);
  add<compact>(exports, "compact", environment);
  add<value_norms>(exports, "valueNorms", environment);
  add<enqueue>(exports, "enqueue", environment);
  add<allocate_memory>(exports, "allocateMemory", environment);
  add<free_memory>(exports, "freeMemory", environment);
  add<upload>(exports, "upload", environment);
  add<download>(exports, "download", environment);
  add<settle>(exports, "settle", environment);
  return exports;
}

}  // namespace
}  // namespace laprox::addon

static Napi::Object load_laprox(Napi::Env env, Napi::Object exports) { return laprox::addon::load(env, exports); }

NODE_API_MODULE(laprox, load_laprox)
