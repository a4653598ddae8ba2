// JavaScript objects that stand for native ones. Each kind has a type tag, so that a wrong handle is an error and no crash.
#pragma once

#include <memory>

#include "addon/failure.hpp"
#include "napi.h"

namespace laprox::addon {

// Makes `object` the handle of `value`. The garbage collector lets go of it where nobody has before.
template <typename T>
void wrap(Napi::Object object, std::shared_ptr<T> value) {
  auto owner = std::make_unique<std::shared_ptr<T>>(std::move(value));
  const auto finalize = [](napi_env, void* data, void*) {
    const std::unique_ptr<std::shared_ptr<T>> last(static_cast<std::shared_ptr<T>*>(data));
    if (*last != nullptr) (*last)->dispose();
  };
  object.TypeTag(&T::kTag);
  if (napi_wrap(object.Env(), object, owner.get(), finalize, nullptr, nullptr) != napi_ok) throw Napi::Error::New(object.Env());
  static_cast<void>(owner.release());
}

template <typename T>
std::shared_ptr<T>& owner_of(Napi::Value handle) {
  bool tagged = false;
  void* data = nullptr;
  if (napi_check_object_type_tag(handle.Env(), handle, &T::kTag, &tagged) != napi_ok || !tagged ||
      napi_unwrap(handle.Env(), handle, &data) != napi_ok)
    fail("INVALID_ARGUMENT", "the native handle is not that of a %s", T::kName);
  return *static_cast<std::shared_ptr<T>*>(data);
}

template <typename T>
const std::shared_ptr<T>& unwrap(Napi::Value handle) {
  const std::shared_ptr<T>& value = owner_of<T>(handle);
  if (value == nullptr || value->disposed()) fail("DISPOSED", "the %s was used after its disposal", T::kName);
  return value;
}

// Disposes of a handle's object, once. Jobs that run keep what they use.
template <typename T>
void release(Napi::Value handle) {
  std::shared_ptr<T>& value = owner_of<T>(handle);
  if (value != nullptr) value->dispose();
  value.reset();
}

}  // namespace laprox::addon
