// Threads that share the items of one region; between regions they spin for a moment and then sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace moe_jax {

class Pool {
 public:
  using Call = void (*)(const void* context, int item, int slot);

  static Pool& instance();

  // Calls work(item, slot) for every item below `items`, on at most `threads` threads including the caller's; `slot`
  // < threads tells them apart. Each slot starts with its own run of items, so that it reads memory in order, and
  // then helps out with the others'. A thread that wakes too late is not waited for.
  template <typename Work>
  void run(int items, int threads, const Work& work) {
    const Call call = [](const void* context, int item, int slot) {
      (*static_cast<const Work*>(context))(item, slot);
    };
    run(items, threads, call, &work);
  }

  // Calls each(item) for every item below `items`, a few at a time, where one alone is little work.
  template <typename Each>
  void run_in_runs(int items, int threads, const Each& each) {
    constexpr int kRun = 8;
    run((items + kRun - 1) / kRun, threads, [&](int run, int) {
      for (int i = run * kRun; i < std::min(items, (run + 1) * kRun); i++) each(i);
    });
  }

  // The first item of a slot's own run.
  static int first_of(int slot, int items, int threads) {
    return static_cast<int>(static_cast<int64_t>(items) * slot / threads);
  }

 private:
  Pool() = default;
  ~Pool();
  void run(int items, int threads, Call call, const void* context);
  void work(int slot);
  void grow(int threads);
  void serve(int slot);

  std::vector<std::thread> workers_;
  std::mutex busy_;  // one region at a time
  Call call_ = nullptr;
  const void* context_ = nullptr;
  int items_ = 0, threads_ = 0;
  static constexpr int kMost = 64;  // threads
  struct alignas(64) Next {
    std::atomic<int> item{0};
  };
  Next next_[kMost];  // of each slot's items
  std::atomic<int> inside_{0}, asleep_{0};
  std::atomic<uint64_t> phase_{0};  // odd while a region is open
  std::atomic<bool> leave_{false};
  std::mutex sleep_;
  std::condition_variable wake_;
};

}  // namespace moe_jax
