// What host code that launches kernels shares: the stream and chip of a call, its workspace, and errors.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "core/status.hpp"

namespace laprox::cuda {

// Throws DEVICE_ERROR (OUT_OF_MEMORY for memory) with CUDA's name for it and the stage.
void check(cudaError_t error, const char* stage);

// What the driver was told and asked about kernels of a device: once for each, not at every launch.
class KernelLimits {
 public:
  static constexpr int64_t kOrdinary = INT64_C(32) << 10;  // of 48 KiB that need no permission; static shared memory comes to it

  // Lets the kernel ask for so much dynamic shared memory.
  void allow(const void* kernel, int64_t shared, const char* stage) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = std::find_if(allowed_.begin(), allowed_.end(), [&](const auto& entry) { return entry.first == kernel; });
    if (known != allowed_.end() && known->second >= shared) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), stage);
    if (known == allowed_.end())
      allowed_.emplace_back(kernel, shared);
    else
      known->second = shared;
  }

  // Blocks of it that a multiprocessor holds at once.
  int resident(const void* kernel, int threads, int64_t shared, const char* stage) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known =
        std::find_if(resident_.begin(), resident_.end(), [&](const Resident& entry) { return entry.kernel == kernel && entry.shared == shared; });
    if (known != resident_.end()) return known->blocks;
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared)), stage);
    resident_.push_back({kernel, shared, blocks});
    return blocks;
  }

 private:
  struct Resident {
    const void* kernel;
    int64_t shared;
    int blocks;
  };
  std::mutex mutex_;
  std::vector<std::pair<const void*, int64_t>> allowed_;
  std::vector<Resident> resident_;
};

// Where and on what a call runs.
struct Launch {
  cudaStream_t stream;
  int multiprocessors;
  bool overlaps;  // the chip can bring a kernel's blocks in while the kernel before it ends (compute capability 9.0 and newer)
  KernelLimits* limits;

  // Enqueues a kernel. It begins with follow_previous() (kernels/views.cuh). Throws if the launch was refused.
  template <typename... Parameters, typename... Arguments>
  void run(const char* stage, void (*kernel)(Parameters...), dim3 grid, int64_t threads, int64_t shared, Arguments&&... arguments) const {
    if (shared > KernelLimits::kOrdinary) limits->allow(reinterpret_cast<const void*>(kernel), shared, stage);
    enqueue(false, stage, kernel, grid, threads, shared, std::forward<Arguments>(arguments)...);
  }

  // The same for one whose blocks wait for each other: `most` of them, or as many as there is room for at once.
  template <typename... Parameters, typename... Arguments>
  void run_together(const char* stage, void (*kernel)(Parameters...), int64_t most, int64_t threads, int64_t shared, Arguments&&... arguments) const {
    if (shared > KernelLimits::kOrdinary) limits->allow(reinterpret_cast<const void*>(kernel), shared, stage);
    const int64_t room = int64_t{multiprocessors} * limits->resident(reinterpret_cast<const void*>(kernel), static_cast<int>(threads), shared, stage);
    enqueue(true, stage, kernel, static_cast<unsigned>(std::min(most, room)), threads, shared, std::forward<Arguments>(arguments)...);
  }

 private:
  template <typename... Parameters, typename... Arguments>
  void enqueue(bool together, const char* stage, void (*kernel)(Parameters...), dim3 grid, int64_t threads, int64_t shared,
               Arguments&&... arguments) const {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream;
    config.attrs = attributes;
    if (overlaps) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (together) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
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
