// The typed arrays of a call, as memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "addon/failure.hpp"
#include "napi.h"

namespace laprox::addon {

struct Buffer {
  std::byte* data;  // never null, even of empty arrays
  int64_t bytes;
  napi_typedarray_type type;
};

// The memory of a typed array; one of 0 bytes where `value` is none.
Buffer buffer_of(napi_env env, napi_value value) noexcept;

class Buffers {
 public:
  // The elements of an array of typed arrays, from index `first` on.
  Buffers(Napi::Value array, uint32_t first);

  size_t count() const { return buffers_.size(); }
  const Buffer& operator[](size_t index) const { return buffers_[index]; }
  // Whether the first `count` elements still are the memory that they were.
  bool attached(napi_env env, napi_value array, size_t count) const noexcept;

 private:
  uint32_t first_;
  std::vector<Buffer> buffers_;
};

}  // namespace laprox::addon
