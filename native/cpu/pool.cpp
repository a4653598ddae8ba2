#include "cpu/pool.hpp"

#include <chrono>

namespace laprox::cpu {
namespace {

constexpr auto kPatience = std::chrono::microseconds(50);  // as long as it takes to fall asleep and be woken
// How long a thread computes before it lets others have its processor. The system takes it away at its own ticks alone, milliseconds apart, for
// which an event loop that was woken would have to wait.
constexpr auto kTurn = std::chrono::microseconds(250);

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether it came true while one looked.
template <typename Condition>
bool spin(std::chrono::microseconds patience, Condition&& condition) {
  constexpr int kLooks = 16;  // at the condition, for one at the clock
  const auto end = std::chrono::steady_clock::now() + patience;
  do {
    for (int i = 0; i < kLooks; ++i) {
      if (condition()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace

Pool::Pool(int threads) : patience_(threads <= static_cast<int>(std::thread::hardware_concurrency()) ? kPatience : kPatience.zero()) {
  workers_.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { work(worker); });
  } catch (const std::system_error&) {
    // As many as the system gives: results do not depend on the number.
  }
}

Pool::~Pool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true, std::memory_order_relaxed);
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run(int64_t count, const std::function<void(int64_t, int)>& task) {
  if (count <= 0) return;
  if (count == 1 || workers_.empty()) {
    for (int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    task_ = &task;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  take(0, task);
  const auto done = [this] { return busy_.load(std::memory_order_acquire) == 0; };
  if (spin(patience_, done)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  idle_.wait(lock, done);
}

void Pool::take(int worker, const std::function<void(int64_t, int)>& task) {
  auto turn = std::chrono::steady_clock::now();
  for (int64_t i = next_.fetch_add(1, std::memory_order_relaxed); i < count_; i = next_.fetch_add(1, std::memory_order_relaxed)) {
    task(i, worker);
    const auto now = std::chrono::steady_clock::now();
    if (now - turn < kTurn) continue;
    std::this_thread::yield();
    turn = now;
  }
}

void Pool::work(int worker) {
  uint64_t seen = 0;
  const auto wanted = [&] { return stopping_.load(std::memory_order_relaxed) || round_.load(std::memory_order_acquire) != seen; };
  for (auto patience = patience_.zero();; patience = patience_) {
    if (!spin(patience, wanted)) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, wanted);
    }
    if (stopping_.load(std::memory_order_relaxed)) return;
    seen = round_.load(std::memory_order_acquire);
    take(worker, *task_);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
    { const std::lock_guard<std::mutex> lock(mutex_); }  // the caller either sees it or sleeps already
    idle_.notify_one();
  }
}

}  // namespace laprox::cpu
