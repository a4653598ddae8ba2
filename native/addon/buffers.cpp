#include "addon/buffers.hpp"

namespace laprox::addon {
namespace {

alignas(64) std::byte nothing[64];

int64_t element_bytes(napi_typedarray_type type) {
  switch (type) {
    case napi_int8_array:
    case napi_uint8_array:
    case napi_uint8_clamped_array: return 1;
    case napi_int16_array:
    case napi_uint16_array: return 2;
    case napi_int32_array:
    case napi_uint32_array:
    case napi_float32_array: return 4;
    case napi_float64_array:
    case napi_bigint64_array:
    case napi_biguint64_array: return 8;
    default: return 0;  // types of later versions of Node-API
  }
}

}  // namespace

Buffer buffer_of(napi_env env, napi_value value) noexcept {
  napi_typedarray_type type = napi_uint8_array;
  size_t length = 0;
  void* data = nullptr;
  // Fails for whatever is no typed array.
  if (napi_get_typedarray_info(env, value, &type, &length, &data, nullptr, nullptr) != napi_ok || data == nullptr) return {nothing, 0, type};
  return {static_cast<std::byte*>(data), static_cast<int64_t>(length) * element_bytes(type), type};
}

Buffers::Buffers(Napi::Value array, uint32_t first) : first_(first) {
  const napi_env env = array.Env();
  uint32_t length = 0;
  if (napi_get_array_length(env, array, &length) != napi_ok || length < first) fail("INVALID_ARGUMENT", "held is no array of %u or more", first);
  buffers_.reserve(length - first);
  for (uint32_t i = first; i < length; ++i) {
    napi_value element;
    if (napi_get_element(env, array, i, &element) != napi_ok) throw Napi::Error::New(env);
    buffers_.push_back(buffer_of(env, element));
  }
}

bool Buffers::attached(napi_env env, napi_value array, size_t count) const noexcept {
  for (size_t i = 0; i < count; ++i) {
    napi_value element;
    if (napi_get_element(env, array, first_ + static_cast<uint32_t>(i), &element) != napi_ok) return false;
    const Buffer now = buffer_of(env, element);
    if (now.data != buffers_[i].data || now.bytes != buffers_[i].bytes) return false;
  }
  return true;
}

}  // namespace laprox::addon
