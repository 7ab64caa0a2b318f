#include "pool.h"

#include <chrono>

namespace moe_jax {
namespace {

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// About as long as the rest of a decoder layer takes, so that decode never waits for a thread to wake.
constexpr std::chrono::microseconds kSpin{300};

}  // namespace

Pool& Pool::instance() {
  static Pool pool;
  return pool;
}

Pool::~Pool() {
  leave_ = true;
  phase_ += 2;
  {
    std::lock_guard<std::mutex> lock(sleep_);
    wake_.notify_all();
  }
  for (std::thread& worker : workers_) worker.join();
}

void Pool::grow(int threads) {
  while (static_cast<int>(workers_.size()) < threads - 1) {
    const int slot = static_cast<int>(workers_.size()) + 1;
    workers_.emplace_back([this, slot] { serve(slot); });
  }
}

void Pool::run(int items, int threads, Call call, const void* context) {
  std::unique_lock<std::mutex> alone(busy_, std::defer_lock);
  threads = std::min(threads, kMost);
  if (items < 2 || threads < 2 || !alone.try_lock()) {
    for (int item = 0; item < items; item++) call(context, item, 0);
    return;
  }
  grow(threads);
  call_ = call, context_ = context, items_ = items, threads_ = threads;
  for (int slot = 0; slot < threads; slot++) next_[slot].item = first_of(slot, items, threads);
  phase_++;
  if (asleep_) {
    std::lock_guard<std::mutex> lock(sleep_);
    wake_.notify_all();
  }
  work(0);
  phase_++;  // who has not entered by now stays outside
  // A thread without a core, as when other work has it, finishes sooner if this one steps aside.
  for (int i = 1; inside_; i++) i % 1024 ? pause() : std::this_thread::yield();
}

void Pool::work(int slot) {
  for (int i = 0; i < threads_; i++) {
    const int of = (slot + i) % threads_, end = first_of(of + 1, items_, threads_);
    for (int item; (item = next_[of].item++) < end;) call_(context_, item, slot);
  }
}

void Pool::serve(int slot) {
  uint64_t seen = 0;
  for (;;) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int i = 1; phase_ == seen && (i % 64 || std::chrono::steady_clock::now() < until); i++)
      i % 64 ? pause() : std::this_thread::yield();  // the runtime's own threads want this core, too
    if (phase_ == seen) {
      std::unique_lock<std::mutex> lock(sleep_);
      asleep_++;
      wake_.wait(lock, [&] { return phase_ != seen; });
      asleep_--;
    }
    if (leave_) return;
    inside_++;
    seen = phase_;
    if (seen % 2 && slot < threads_) {
      work(slot);
    }
    inside_--;
  }
}

}  // namespace moe_jax
