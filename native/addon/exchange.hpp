// The small memory of one call on a GPU: integers of the host that go up before its work, and results that come down after
// it, one copy each way. On the device: [inputs | status | results].
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "addon/buffers.hpp"
#include "addon/device.hpp"

namespace laprox::addon {

class Exchange {
 public:
  explicit Exchange(Device& device) : device_(device) {}
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  // Before `send`, which sets *where to the address on the device. A typed array goes up once, whole.
  void input(const int32_t** where, const Buffer& buffer, int64_t element);
  void input(const void** where, const void* from, int64_t bytes);
  template <typename T>
  void output(T** where, int64_t count) {
    outputs_.push_back({reinterpret_cast<void**>(where), output_bytes_});
    output_bytes_ += aligned(count * static_cast<int64_t>(sizeof(T)));
  }

  // Page-locked memory of the host, for copies beside the exchange.
  void room(int64_t bytes) { room_bytes_ = bytes; }
  std::byte* host_room() const { return pinned_.data + input_bytes_ + kAlignment + output_bytes_; }

  // Device thread. The host's memory has been read when `send` returns; the status is LPX_OK on the device and kNothing here.
  void send(void* stream);
  void receive(void* stream);
  // Instead of `receive`, where a call failed on the way.
  void drop(void* stream) noexcept;
  int32_t* device_status() const { return status_; }

  // After the stream has ended: what a call left at an address that `output` gave. Not there where the device failed.
  static constexpr int32_t kNothing = -1;
  int32_t status() const { return *reinterpret_cast<const volatile int32_t*>(down()); }
  template <typename T>
  const T* result(const T* address) const {
    return reinterpret_cast<const T*>(down() + (reinterpret_cast<const std::byte*>(address) - reinterpret_cast<const std::byte*>(status_)));
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  struct Input {
    const void* from;
    int64_t bytes;
    int64_t offset;
  };
  struct Patch {
    void** where;
    int64_t offset;
  };

  const std::byte* down() const { return pinned_.data + input_bytes_ + kAlignment; }
  int64_t take(const void* from, int64_t bytes);

  Device& device_;
  std::shared_ptr<Opened> opened_;
  std::vector<Input> inputs_;
  std::vector<Patch> input_patches_;
  std::vector<Patch> outputs_;
  int64_t input_bytes_ = 0;
  int64_t output_bytes_ = kAlignment;  // the status comes first
  int64_t room_bytes_ = 0;
  Pinned pinned_{};
  std::byte* memory_ = nullptr;  // on the device
  int32_t* status_ = nullptr;    // in it
};

}  // namespace laprox::addon
