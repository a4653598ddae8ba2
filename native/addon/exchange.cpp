#include "addon/exchange.hpp"

namespace laprox::addon {

Exchange::~Exchange() { device_.give(opened_, pinned_); }

int64_t Exchange::take(const void* from, int64_t bytes) {
  for (const Input& input : inputs_)
    if (input.from == from && input.bytes == bytes) return input.offset;
  inputs_.push_back({from, bytes, input_bytes_});
  input_bytes_ += aligned(bytes);
  return inputs_.back().offset;
}

void Exchange::input(const int32_t** where, const Buffer& buffer, int64_t element) {
  input_patches_.push_back({reinterpret_cast<void**>(const_cast<int32_t**>(where)), take(buffer.data, buffer.bytes) + element * 4});
}

void Exchange::input(const void** where, const void* from, int64_t bytes) {
  input_patches_.push_back({const_cast<void**>(where), take(from, bytes)});
}

void Exchange::send(void* stream) {
  opened_ = device_.opened();
  // Host: what goes up, the status with it, then what comes down, then the room.
  const int64_t up = input_bytes_ + kAlignment;
  pinned_ = device_.take(up + output_bytes_ + room_bytes_);
  for (const Input& input : inputs_)
    if (input.bytes > 0) std::memcpy(pinned_.data + input.offset, input.from, static_cast<size_t>(input.bytes));
  constexpr int32_t kOk = LPX_OK;
  std::memcpy(pinned_.data + input_bytes_, &kOk, sizeof kOk);
  std::memcpy(pinned_.data + up, &kNothing, sizeof kNothing);

  void* memory = nullptr;
  check(lpx_allocate(opened_->handle, LPX_MEMORY_DEVICE, input_bytes_ + output_bytes_, stream, &memory));
  memory_ = static_cast<std::byte*>(memory);
  status_ = reinterpret_cast<int32_t*>(memory_ + input_bytes_);
  for (const Patch& patch : input_patches_) *patch.where = memory_ + patch.offset;
  for (const Patch& patch : outputs_) *patch.where = memory_ + input_bytes_ + patch.offset;
  check(lpx_copy(opened_->handle, memory_, pinned_.data, up, stream));
}

void Exchange::receive(void* stream) {
  if (memory_ == nullptr) return;
  check(lpx_copy(opened_->handle, const_cast<std::byte*>(down()), status_, output_bytes_, stream));
  drop(stream);
}

void Exchange::drop(void* stream) noexcept {
  if (memory_ != nullptr) lpx_free(opened_->handle, LPX_MEMORY_DEVICE, memory_, stream);
  memory_ = nullptr;
}

}  // namespace laprox::addon
