// What host code that launches kernels shares: the stream and chip of a call, its workspace, and errors.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/status.hpp"

namespace laprox::cuda {

// Throws DEVICE_ERROR (OUT_OF_MEMORY for memory) with CUDA's name for it and the stage.
void check(cudaError_t error, const char* stage);

// Where and on what a call runs.
struct Launch {
  cudaStream_t stream;
  int multiprocessors;
  bool overlaps;  // the chip can bring a kernel's blocks in while the kernel before it ends (compute capability 9.0 and newer)

  // Enqueues a kernel. It begins with follow_previous() (kernels/views.cuh). Throws if the launch was refused.
  template <typename... Parameters, typename... Arguments>
  void run(const char* stage, void (*kernel)(Parameters...), dim3 grid, int64_t threads, int64_t shared, Arguments&&... arguments) const {
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = overlaps ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), stage);
  }
};

// Hands out parts of a workspace, 256-byte aligned. Without memory it only counts: the same code that takes the parts of a
// call answers how many bytes they need.
class Arena {
 public:
  Arena() = default;
  Arena(void* memory, int64_t bytes) : memory_(static_cast<char*>(memory)), capacity_(bytes) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    const int64_t from = bytes_;
    bytes_ += bytes;
    if (memory_ == nullptr) return nullptr;
    if (bytes_ > capacity_) fail(LPX_INTERNAL, "a workspace of %lld bytes is too small", static_cast<long long>(capacity_));
    return reinterpret_cast<T*>(memory_ + from);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_ = nullptr;
  int64_t capacity_ = 0;
  int64_t bytes_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace laprox::cuda
