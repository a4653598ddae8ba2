#include <cinttypes>
#include <cstdio>

#include "cuda/device.hpp"

namespace laprox::cuda {
namespace {

// Compute capabilities.
constexpr int kOldest = 80;
constexpr int kHopperCapability = 90;

Path path_of(lpx_kernels kernels, int capability) {
  switch (kernels) {
    case LPX_KERNELS_AUTO: return capability == kHopperCapability ? Path::kHopper : Path::kPortable;
    case LPX_KERNELS_PLAIN: return Path::kPlain;
    case LPX_KERNELS_PORTABLE: return Path::kPortable;
    case LPX_KERNELS_HOPPER: return Path::kHopper;
  }
  fail(LPX_INVALID_ARGUMENT, "options->kernels is %d; expected one of lpx_kernels", static_cast<int>(kernels));
}

}  // namespace

void check(cudaError_t error, const char* stage) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what is not sticky is told once
  if (error == cudaErrorMemoryAllocation) fail(LPX_OUT_OF_MEMORY, "%s: the device has not enough memory (%s)", stage, cudaGetErrorName(error));
  fail(LPX_DEVICE_ERROR, "%s: %s: %s", stage, cudaGetErrorName(error), cudaGetErrorString(error));
}

void describe_backend(lpx_backend_info& info) {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices > 0) {
    info.available = 1;
    info.device_count = devices;
    return;
  }
  cudaGetLastError();
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (driver == 0) {
    std::snprintf(info.code, sizeof info.code, "NO_DRIVER");
    std::snprintf(info.reason, sizeof info.reason, "no NVIDIA driver is installed on this machine");
  } else if (error == cudaErrorInsufficientDriver) {
    std::snprintf(info.code, sizeof info.code, "DRIVER_TOO_OLD");
    std::snprintf(info.reason, sizeof info.reason, "the NVIDIA driver serves CUDA %d.%d; laprox needs a driver for CUDA %d.%d or newer",
                  driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  } else {
    std::snprintf(info.code, sizeof info.code, "NO_DEVICE");
    std::snprintf(info.reason, sizeof info.reason, "the NVIDIA driver shows no GPU%s%s", error == cudaSuccess ? "" : ": ",
                  error == cudaSuccess ? "" : cudaGetErrorString(error));
  }
}

Device::Device(const lpx_device_options& options) : index_(options.index) {
  check(cudaSetDevice(index_), "opening the device");
  check(cudaGetDeviceProperties(&properties_, index_), "opening the device");
  const int capability = properties_.major * 10 + properties_.minor;
  if (capability < kOldest)
    fail(LPX_UNSUPPORTED, "%s has compute capability %d.%d; laprox needs %d.%d or newer", properties_.name, properties_.major, properties_.minor,
         kOldest / 10, kOldest % 10);
  path_ = path_of(options.kernels, capability);
  if (path_ == Path::kHopper && capability != kHopperCapability)
    fail(LPX_UNSUPPORTED, "options->kernels is LPX_KERNELS_HOPPER, but %s has compute capability %d.%d", properties_.name, properties_.major,
         properties_.minor);
  check(cudaStreamCreateWithFlags(&own_, cudaStreamNonBlocking), "opening the device");
  cudaMemPoolProps pool{};
  pool.allocType = cudaMemAllocationTypePinned;
  pool.location = {cudaMemLocationTypeDevice, index_};
  const cudaError_t pooled = cudaMemPoolCreate(&pool_, &pool);
  if (pooled != cudaSuccess) cudaStreamDestroy(own_);
  check(pooled, "opening the device");
  uint64_t everything = UINT64_MAX;  // a call's workspace stays for the next one
  cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &everything);
}

Device::~Device() {
  cudaSetDevice(index_);
  cudaStreamSynchronize(own_);
  cudaStreamDestroy(own_);
  cudaMemPoolDestroy(pool_);
}

void Device::use() const { check(cudaSetDevice(index_), "using the device"); }

void Device::info(lpx_device_info& info) const {
  info.backend = LPX_CUDA;
  info.index = index_;
  std::snprintf(info.name, sizeof info.name, "%s", properties_.name);
  std::snprintf(info.isa, sizeof info.isa, "sm_%d", properties_.major * 10 + properties_.minor);
  info.memory_bytes = static_cast<int64_t>(properties_.totalGlobalMem);
}

void Device::check_alive() const {
  const cudaError_t error = cudaStreamQuery(own_);
  if (error != cudaErrorNotReady) check(error, "the device is lost");
}

Launch Device::launch(void* handle) const { return {stream(handle), properties_.multiProcessorCount, properties_.major >= 9, &limits_}; }

void* Device::allocate(lpx_memory kind, int64_t bytes, void* stream_handle) const {
  if (bytes == 0) bytes = 1;
  void* memory = nullptr;
  cudaError_t error = cudaSuccess;
  if (kind == LPX_MEMORY_HOST) {
    error = cudaHostAlloc(&memory, static_cast<size_t>(bytes), cudaHostAllocMapped | cudaHostAllocPortable);
  } else {
    error = cudaMallocFromPoolAsync(&memory, static_cast<size_t>(bytes), pool_, stream(stream_handle));
    if (error == cudaErrorMemoryAllocation) {  // the pool may hold what other shapes needed
      cudaGetLastError();
      cudaMemPoolTrimTo(pool_, 0);
      error = cudaMallocFromPoolAsync(&memory, static_cast<size_t>(bytes), pool_, stream(stream_handle));
    }
  }
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    fail(LPX_OUT_OF_MEMORY, "%s has no %" PRId64 " bytes left (%s)", kind == LPX_MEMORY_HOST ? "the host" : properties_.name, bytes,
         cudaGetErrorName(error));
  }
  check(error, "allocation");
  return memory;
}

void Device::free(lpx_memory kind, void* memory, void* stream_handle) const noexcept {
  if (kind == LPX_MEMORY_HOST)
    cudaFreeHost(memory);
  else
    cudaFreeAsync(memory, stream(stream_handle));
}

Workspace::Workspace(const Device& device, const lpx_call& call, int64_t bytes)
    : device_(device), stream_(call.stream), memory_(call.workspace), bytes_(bytes), owned_(call.workspace == nullptr) {
  if (owned_) {
    memory_ = device.allocate(LPX_MEMORY_DEVICE, bytes, stream_);
  } else if (call.workspace_bytes < bytes) {
    fail(LPX_OUT_OF_MEMORY, "call->workspace_bytes is %" PRId64 "; this call needs %" PRId64, call.workspace_bytes, bytes);
  }
}

Workspace::~Workspace() {
  if (owned_) device_.free(LPX_MEMORY_DEVICE, memory_, stream_);
}

}  // namespace laprox::cuda
