// A GPU: its streams, its memory pool, and which kernels run on it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "cuda/launch/launch.hpp"
#include "cuda/launch/path.hpp"
#include "laprox/laprox.h"

namespace laprox::cuda {

// Lack of a device is data: fills info->code and reason.
void describe_backend(lpx_backend_info& info);

class Device {
 public:
  explicit Device(const lpx_device_options& options);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Makes it the calling thread's device: every entry begins with it.
  void use() const;
  void info(lpx_device_info& info) const;
  // Throws DEVICE_ERROR where the context is lost.
  void check_alive() const;

  Path path() const { return path_; }
  // The stream of a call: the caller's, or the device's own for NULL.
  cudaStream_t stream(void* handle) const { return handle == nullptr ? own_ : static_cast<cudaStream_t>(handle); }
  Launch launch(void* stream) const;

  void* allocate(lpx_memory kind, int64_t bytes, void* stream) const;
  void free(lpx_memory kind, void* memory, void* stream) const noexcept;

 private:
  int index_;
  Path path_;
  cudaDeviceProp properties_{};
  cudaStream_t own_ = nullptr;
  cudaMemPool_t pool_ = nullptr;
  mutable KernelLimits limits_;
};

// Device memory of one call, given back to the pool in the order of its stream: the caller's workspace, or the pool's.
class Workspace {
 public:
  Workspace(const Device& device, const lpx_call& call, int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  Arena arena() const { return Arena(memory_, bytes_); }

 private:
  const Device& device_;
  void* stream_;
  void* memory_;
  int64_t bytes_;
  bool owned_;
};

// Memory of a model, for as long as it lives.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { check(cudaMalloc(reinterpret_cast<void**>(&data_), static_cast<size_t>(count) * sizeof(T)), "model memory"); }
  ~Buffer() { cudaFree(data_); }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace laprox::cuda
