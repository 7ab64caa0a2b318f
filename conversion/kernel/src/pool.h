// Threads that share the items of one region; between regions they spin for a moment and then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace moe_jax {

class Pool {
 public:
  using Call = void (*)(const void* work, int item, int slot);

  static Pool& instance();

  // Calls work(context, item, slot) for every item below `items`, on at most `threads` threads including the
  // caller's; `slot` < threads tells them apart. A thread that wakes too late is not waited for.
  template <typename Work>
  void run(int items, int threads, const Work& work) {
    const Call call = [](const void* w, int item, int slot) { (*static_cast<const Work*>(w))(item, slot); };
    run(items, threads, call, &work);
  }

 private:
  Pool() = default;
  ~Pool();
  void run(int items, int threads, Call call, const void* work);
  void grow(int threads);
  void serve(int slot);

  std::vector<std::thread> workers_;
  std::mutex busy_;  // one region at a time
  Call call_ = nullptr;
  const void* work_ = nullptr;
  int items_ = 0, threads_ = 0;
  std::atomic<int> next_{0}, inside_{0}, asleep_{0};
  std::atomic<uint64_t> phase_{0};  // odd while a region is open
  std::atomic<bool> leave_{false};
  std::mutex sleep_;
  std::condition_variable wake_;
};

}  // namespace moe_jax
