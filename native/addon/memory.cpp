#include "addon/memory.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>

#include "addon/handle.hpp"
#include "addon/stream_job.hpp"

namespace laprox::addon {

Memory::~Memory() {
  if (data_ != nullptr) device_->discard(opened_, kind_, data_);
}

std::byte* Memory::allocate(int64_t bytes, void* stream) {
  opened_ = device_->opened();
  void* memory = nullptr;
  check(lpx_allocate(opened_->handle, kind_, bytes, stream, &memory));
  data_ = static_cast<std::byte*>(memory);
  return data_;
}

namespace {

// Results of up to so many bytes are copied once more, into an array of JavaScript's own.
constexpr int64_t kSmall = 1 << 18;

// Allocates, or is given an address; with a typed array, copies it there. Further buffer: [address].
class UploadJob : public StreamJob {
 public:
  UploadJob(const Napi::CallbackInfo& info, const std::shared_ptr<Device>& device, bool copies)
      : StreamJob(device, info[4], info[1], copies ? "the copy to the device" : "the allocation"), bytes_(info[3].As<Napi::Number>().Int64Value()) {
    if (info[2].IsNumber()) {
      to_ = pointer_to<std::byte>(info[2].As<Napi::Number>().Int64Value());
    } else {
      memory_ = std::make_shared<Memory>(device, LPX_MEMORY_DEVICE);
      wrap(info[2].As<Napi::Object>(), memory_);
    }
    address_ = elements<double>(next_buffer(), 0, 1);
    if (!copies) return;
    const Buffer& source = next_buffer();
    if (bytes_ < 0 || bytes_ > source.bytes) fail("DETACHED", "the data to copy has %lld bytes", static_cast<long long>(source.bytes));
    from_ = source.data;
  }

 private:
  void enqueue() override {
    if (memory_ != nullptr) to_ = memory_->allocate(std::max<int64_t>(bytes_, 1), stream());
    exchange().send(stream());
    if (from_ != nullptr && bytes_ > 0) check(lpx_copy(handle(), to_, from_, bytes_, stream()));
    exchange().receive(stream());
  }
  bool changes_inputs() const override { return memory_ == nullptr; }
  void finish(Napi::Array) override { *address_ = static_cast<double>(reinterpret_cast<uintptr_t>(to_)); }

  std::shared_ptr<Memory> memory_;
  std::byte* to_ = nullptr;
  const int64_t bytes_;
  const std::byte* from_ = nullptr;
  double* address_;
};

// held[0] gets `data`, an ArrayBuffer.
class DownloadJob : public StreamJob {
 public:
  DownloadJob(const Napi::CallbackInfo& info, const std::shared_ptr<Device>& device)
      : StreamJob(device, info[4], info[1], "the copy from the device"),
        from_(pointer_to<const void>(info[2].As<Napi::Number>().Int64Value())),
        bytes_(info[3].As<Napi::Number>().Int64Value()) {
    if (bytes_ < 0) fail("INVALID_ARGUMENT", "%lld bytes", static_cast<long long>(bytes_));
  }

 private:
  void enqueue() override {
    if (bytes_ <= kSmall) {
      exchange().room(bytes_);
    } else {
      large_ = std::make_shared<Memory>(shared_device(), LPX_MEMORY_HOST);
      large_->allocate(bytes_, stream());
    }
    exchange().send(stream());
    std::byte* to = large_ == nullptr ? exchange().host_room() : large_->data();
    if (bytes_ > 0) check(lpx_copy(handle(), to, from_, bytes_, stream()));
    exchange().receive(stream());
  }

  void finish(Napi::Array held) override {
    const auto bytes = static_cast<size_t>(bytes_);
    const std::byte* data = large_ == nullptr ? exchange().host_room() : large_->data();
    napi_value array = nullptr;
    if (large_ != nullptr) {
      // The page-locked memory itself. V8 accounts for it, and frees it with the array.
      auto* const owner = new std::shared_ptr<Memory>(large_);
      const auto finalize = [](napi_env, void*, void* hint) { delete static_cast<std::shared_ptr<Memory>*>(hint); };
      if (napi_create_external_arraybuffer(env(), large_->data(), bytes, finalize, owner, &array) != napi_ok) {
        delete owner;
        array = nullptr;  // platforms that allow no memory but their own
      }
    }
    if (array == nullptr) {
      void* copy = nullptr;
      if (napi_create_arraybuffer(env(), bytes, &copy, &array) != napi_ok) fail("OUT_OF_MEMORY", "%zu bytes could not be allocated", bytes);
      if (bytes > 0) std::memcpy(copy, data, bytes);
    }
    held.Get(0u).As<Napi::Object>().Set("data", Napi::Value(env(), array));
  }

  const void* const from_;
  const int64_t bytes_;
  std::shared_ptr<Memory> large_;
};

}  // namespace

// (device, streams, handle, bytes, held); after `held`: [address]
Napi::Value allocate_memory(const Napi::CallbackInfo& info) { return submit(std::make_unique<UploadJob>(info, unwrap<Device>(info[0]), false)); }

// (device, streams, handle or address, bytes, held); after `held`: [address], the typed array to copy
Napi::Value upload(const Napi::CallbackInfo& info) { return submit(std::make_unique<UploadJob>(info, unwrap<Device>(info[0]), true)); }

// (device, streams, address, bytes, held); held[0], an object, gets `data`, an ArrayBuffer
Napi::Value download(const Napi::CallbackInfo& info) { return submit(std::make_unique<DownloadJob>(info, unwrap<Device>(info[0]))); }

// (array buffer): the offset of its first cache line. What has not been written of it will lie on huge pages where the system gives any to those who
// ask: each run of rows out of a large cache is on another page, and its address is found sooner.
Napi::Value settle(const Napi::CallbackInfo& info) {
  constexpr uintptr_t kCacheLine = 64;
  auto buffer = info[0].As<Napi::ArrayBuffer>();
  const auto begin = reinterpret_cast<uintptr_t>(buffer.Data());
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (begin + buffer.ByteLength()) / kHugePage * kHugePage;
  if (first < end) madvise(pointer_to<void>(static_cast<int64_t>(first)), end - first, MADV_HUGEPAGE);  // as good without
#endif
  return Napi::Number::New(info.Env(), static_cast<double>((kCacheLine - begin % kCacheLine) % kCacheLine));
}

// (memory)
Napi::Value free_memory(const Napi::CallbackInfo& info) {
  owner_of<Memory>(info[0]).reset();
  return info.Env().Undefined();
}

}  // namespace laprox::addon
