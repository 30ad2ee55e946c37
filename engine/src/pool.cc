#include "pool.h"

#include <unistd.h>

#include <algorithm>

#include "arch.h"

namespace lowbit {
namespace {

constexpr int kSpins =
    4000;  // tens of microseconds: the next step usually comes soon, and waking a thread takes longer

inline void Pause() {
#if LOWBIT_X86
  __builtin_ia32_pause();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) : owner_(getpid()) {
  for (int t = 1; t < threads; ++t) workers_.emplace_back([this, t] { Work(t); });
}

bool ThreadPool::alive() const { return getpid() == owner_; }

ThreadPool::~ThreadPool() {
  if (!alive()) {
    for (std::thread& worker : workers_) worker.detach();
    return;
  }
  stop_ = true;
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int64_t count, int64_t grain, const std::function<void(int, int64_t, int64_t)>& body) {
  if (workers_.empty() || count <= grain) {
    body(0, 0, count);
    return;
  }
  body_ = &body;
  count_ = count;
  grain_ = grain;
  next_.store(0, std::memory_order_relaxed);
  busy_.store(int(workers_.size()), std::memory_order_relaxed);
  round_.fetch_add(1, std::memory_order_release);
  round_.notify_all();
  Share(0);
  for (int busy, spins = 0; (busy = busy_.load(std::memory_order_acquire)) != 0;) {
    if (++spins > kSpins) busy_.wait(busy, std::memory_order_acquire);
    Pause();
  }
}

void ThreadPool::Share(int thread) {
  for (;;) {
    const int64_t first = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (first >= count_) return;
    (*body_)(thread, first, std::min(first + grain_, count_));
  }
}

void ThreadPool::Work(int thread) {
  const FloatMode mode;
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; round_.load(std::memory_order_acquire) == seen;) {
      if (++spins > kSpins) round_.wait(seen, std::memory_order_acquire);
      Pause();
    }
    ++seen;
    if (stop_) return;
    Share(thread);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
  }
}

}  // namespace lowbit
