// Worker threads of a CPU device, and the progress of a call that runs on them.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "core/status.hpp"
#include "laprox/laprox.h"

namespace laprox::cpu {

// Counts work units and asks the caller, now and then, whether to go on.
class Progress {
 public:
  Progress(const lpx_call& call, int64_t total) : call_(call), total_(total) {}

  // Thread-safe. False once the caller wants to stop.
  bool advance(int64_t units) {
    const int64_t done = done_.fetch_add(units, std::memory_order_relaxed) + units;
    if (call_.progress == nullptr) return true;
    const std::unique_lock<std::mutex> lock(reporting_, std::try_to_lock);
    if (lock.owns_lock() && call_.progress(call_.user, done < total_ ? done : total_, total_) != 0) cancelled_.store(true, std::memory_order_relaxed);
    return !cancelled();
  }
  bool cancelled() const { return cancelled_.load(std::memory_order_relaxed); }
  void check() const {
    if (cancelled()) fail(LPX_CANCELLED, "the call was cancelled");
  }

 private:
  const lpx_call& call_;
  const int64_t total_;
  std::atomic<int64_t> done_{0};
  std::atomic<bool> cancelled_{false};
  std::mutex reporting_;
};

// A call is a few dozen rounds, which follow each other in microseconds: less than it takes to wake a thread. So whoever waits looks for some tens of
// microseconds, if there is a processor for it, before it goes to sleep.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(index, worker) for each index below `count`, workers being 0 to threads() - 1; the caller is worker 0.
  // Returns when all are done. Tasks must not throw. One call at a time.
  void run(int64_t count, const std::function<void(int64_t, int)>& task);

 private:
  void work(int worker);
  void take(int worker, const std::function<void(int64_t, int)>& task);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  const std::chrono::microseconds patience_;
  const std::function<void(int64_t, int)>* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<uint64_t> round_{0};  // what belongs to a round is there before its number
  std::atomic<int> busy_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace laprox::cpu
