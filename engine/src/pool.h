// A few threads that share out the rows of one step after the other.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lowbit {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // the caller is one of them
  ~ThreadPool();

  // False in a process forked from the one that made the pool: threads do not survive a fork.
  bool alive() const;

  // Calls body(thread, first, last) on pieces of 0..count, each thread in the engine's float mode. Returns when all are
  // done. One caller at a time.
  void Run(int64_t count, int64_t grain, const std::function<void(int, int64_t, int64_t)>& body);

 private:
  void Work(int thread);
  void Share(int thread);

  std::vector<std::thread> workers_;
  const int owner_;  // process
  const std::function<void(int, int64_t, int64_t)>* body_ = nullptr;
  int64_t count_ = 0, grain_ = 1;
  std::atomic<int64_t> next_{0};
  std::atomic<uint32_t> round_{0};
  std::atomic<int> busy_{0};
  bool stop_ = false;
};

}  // namespace lowbit
