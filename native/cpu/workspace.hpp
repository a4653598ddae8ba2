// Scratch memory of a call, carved from one block: the caller's, or the device's own. The same code that carves it
// also measures it, so that the size a query reports is the size a call takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "laprox/laprox.h"

namespace laprox::cpu {

// A block that a device keeps between calls, so that their pages are touched once.
class ScratchPool {
 public:
  // At least `bytes`, aligned to 64. Throws std::bad_alloc. Larger blocks than kKept are given back by trim().
  std::byte* get(int64_t bytes) {
    if (bytes > bytes_) {
      block_.reset();
      bytes_ = 0;
      block_.reset(static_cast<std::byte*>(std::aligned_alloc(64, static_cast<size_t>(bytes))));
      if (!block_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return block_.get();
  }
  void trim() {
    if (bytes_ <= kKept) return;
    block_.reset();
    bytes_ = 0;
  }

 private:
  static constexpr int64_t kKept = INT64_C(256) << 20;
  struct Free {
    void operator()(std::byte* block) const { std::free(block); }
  };
  std::unique_ptr<std::byte, Free> block_;
  int64_t bytes_ = 0;
};

class Workspace {
 public:
  // Measures: take() returns null and only counts.
  Workspace() = default;
  // Carves from the caller's workspace, or from the device's pool.
  Workspace(const lpx_call& call, ScratchPool& pool, int64_t bytes) : base_(static_cast<std::byte*>(call.workspace)) {
    if (base_ != nullptr || bytes == 0) return;
    pool_ = &pool;
    base_ = pool.get(bytes);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (pool_ != nullptr) pool_->trim();
  }

  template <typename T>
  T* take(int64_t count) {
    const int64_t offset = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset);
  }
  int64_t bytes() const { return bytes_; }

 private:
  ScratchPool* pool_ = nullptr;
  std::byte* base_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace laprox::cpu
