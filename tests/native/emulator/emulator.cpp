// Compiled without sanitizers, which should see the accesses of the kernels alone.
#include "emulator.h"

#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "../fuzz/random.h"

// Each is null unless the program is built with that sanitizer.
#define DF_WEAK __attribute__((weak))
extern "C" {
DF_WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
DF_WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
DF_WEAK void __asan_unpoison_memory_region(const volatile void* address, size_t size);
DF_WEAK void* __tsan_get_current_fiber();
DF_WEAK void* __tsan_create_fiber(unsigned flags);
DF_WEAK void __tsan_destroy_fiber(void* fiber);
DF_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
DF_WEAK void __tsan_acquire(void* address);
DF_WEAK void __tsan_release(void* address);
}

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Settings settings;

namespace {

constexpr size_t kStack = 1 << 18;  // a sanitizer's report takes most of it
constexpr unsigned kWarp = 32;

// Found by dlsym: AddressSanitizer's own version forgets what is poisoned on the other stack.
int swap_contexts(ucontext_t* from, const ucontext_t* to) {
  using Swap = int (*)(ucontext_t*, const ucontext_t*);
  static const auto swap =
      reinterpret_cast<Swap>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "swapcontext"));
  return swap(from, to);
}

struct Fiber {
  ucontext_t context;
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
  void* thread = nullptr;  // ThreadSanitizer's
  std::unique_ptr<char[]> stack;
  int line = 0;           // of the barrier or shuffle at which it waits
  unsigned barriers = 0;  // passed in this block; the parity selects meet_ and any_
  unsigned shuffles = 0;
  uint64_t posted[2];  // for shuffles; a lane is at most one ahead of the others
  int lanes = 0;

  ~Fiber() {
    if (stack && thread) __tsan_destroy_fiber(thread);
  }
};

void switch_fiber(Fiber& from, const Fiber& to) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.thread, 1);  // 1: orders nothing
  swap_contexts(&from.context, &to.context);
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
  }
}
void acquire(char& address) {
  if (__tsan_acquire) __tsan_acquire(&address);
}
void release(char& address) {
  if (__tsan_release) __tsan_release(&address);
}

// Runs one block after another.
class Processor {
 public:
  char failure[120] = "";

  // Runs blocks begin, begin + step, ... of `order`.
  void run(const std::vector<unsigned>& order, size_t begin, size_t step, unsigned threads,
           size_t shared_bytes, const Kernel& kernel);
  void start();  // entry of a thread: runs the kernel
  bool barrier(bool value, int line);
  uint64_t shuffle_xor(uint64_t value, int lanes, int line);
  void pause() {
    ready_.push_back(current_);
    next();
  }
  // Leaves the thread without unwinding its stack, so the message must not own memory.
  template <typename... Values>
  [[noreturn]] void fail(const char* format, Values... values) {
    explain(format, values...);
    release(end_[0]);
    switch_fiber(fibers_[current_], home_);
    std::abort();
  }
  void* shared() { return shared_.get(); }

 private:
  template <typename... Values>
  void explain(const char* format, Values... values) {
    std::snprintf(failure, sizeof failure, format, values...);
  }
  bool failed() const { return failure[0] != 0; }
  void prepare(unsigned threads);
  size_t pick();
  void next();
  void run_block();

  Random random_{0};
  const Kernel* kernel_ = nullptr;
  Fiber home_;
  std::vector<Fiber> fibers_;
  std::vector<unsigned> ready_, at_barrier_;
  std::vector<std::vector<unsigned>> at_shuffle_;  // by warp
  uint64_t favoured_ = 0;
  unsigned current_ = 0, ended_ = 0, blocks_ = 0;
  struct Free {
    void operator()(void* address) const { std::free(address); }
  };
  std::unique_ptr<void, Free> shared_;
  bool any_[2];
  char meet_[2], end_[2];  // ThreadSanitizer's ordering by barriers and by successive blocks
};

__thread Processor* here;

void enter() { here->start(); }

void Processor::prepare(unsigned threads) {
  if (fibers_.size() != threads) fibers_ = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers_) {
    if (!fiber.stack) {
      fiber.stack.reset(new char[kStack]);
      fiber.bottom = fiber.stack.get();
      fiber.size = kStack;
      if (__tsan_create_fiber) fiber.thread = __tsan_create_fiber(0);
    }
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, enter, 0);
  }
  // Reserved, so that threads neither allocate nor copy memory here: ThreadSanitizer intercepts that.
  ready_.reserve(threads);
  at_barrier_.reserve(threads);
  at_shuffle_.resize((threads + kWarp - 1) / kWarp);
  for (auto& warp : at_shuffle_) warp.reserve(kWarp);
  if (__tsan_get_current_fiber) home_.thread = __tsan_get_current_fiber();
}

void Processor::start() {
  if (__sanitizer_finish_switch_fiber) {
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (home_.size == 0) {  // the first thread is entered from there
      home_.bottom = bottom;
      home_.size = size;
    }
  }
  for (;;) {
    threadIdx = {current_, 0, 0};
    acquire(end_[(blocks_ + 1) % 2]);
    (*kernel_)();
    release(end_[blocks_ % 2]);
    ++ended_;
    next();
  }
}

// The index in ready_ of the thread to continue. One warp is favoured for a while and may run far
// ahead: threads drawn evenly would stay close together.
size_t Processor::pick() {
  if (random_.below(64) == 0) favoured_ = random_.below(at_shuffle_.size());
  const size_t first = random_.below(ready_.size());
  for (size_t i = 0; i < ready_.size(); ++i) {
    const size_t index = (first + i) % ready_.size();
    if (ready_[index] / kWarp == favoured_) return index;
  }
  return first;
}

// Continues another thread or, if none is ready, the caller of run_block. Returns when this thread is
// continued.
void Processor::next() {
  const unsigned mine = current_;
  if (ready_.empty()) {
    switch_fiber(fibers_[mine], home_);
  } else {
    std::swap(ready_[pick()], ready_.back());
    current_ = ready_.back();
    ready_.pop_back();
    if (current_ != mine) switch_fiber(fibers_[mine], fibers_[current_]);
  }
  threadIdx = {mine, 0, 0};
}

void Processor::run_block() {
  ready_.resize(fibers_.size());
  std::iota(ready_.begin(), ready_.end(), 0u);
  at_barrier_.clear();
  for (auto& warp : at_shuffle_) warp.clear();
  ended_ = 0;
  any_[0] = any_[1] = false;
  for (Fiber& fiber : fibers_) fiber.barriers = fiber.shuffles = 0;
  current_ = static_cast<unsigned>(random_.below(fibers_.size()));
  std::swap(ready_[current_], ready_.back());
  ready_.pop_back();
  switch_fiber(home_, fibers_[current_]);
  if (failed() || ended_ == fibers_.size()) return;
  std::vector<unsigned> waiting = at_barrier_;
  for (const auto& warp : at_shuffle_) waiting.insert(waiting.end(), warp.begin(), warp.end());
  explain("%zu of %zu threads wait, one at line %d, for others that have ended or wait elsewhere",
          waiting.size(), fibers_.size(), fibers_[waiting.front()].line);
}

void Processor::run(const std::vector<unsigned>& order, size_t begin, size_t step,
                    unsigned threads, size_t shared_bytes, const Kernel& kernel) {
  here = this;
  kernel_ = &kernel;
  random_.state = settings.seed + begin;
  prepare(threads);
  shared_.reset(shared_bytes > 0 ? std::aligned_alloc(16, shared_bytes) : nullptr);
  blockDim = {threads, 1, 1};
  gridDim = {static_cast<unsigned>(order.size()), 1, 1};
  for (size_t i = begin; i < order.size() && !failed(); i += step, ++blocks_) {
    blockIdx = {order[i], 0, 0};
    acquire(end_[(blocks_ + 1) % 2]);
    if (shared_bytes > 0) std::memset(shared_.get(), 0xA5, shared_bytes);
    release(end_[(blocks_ + 1) % 2]);
    run_block();
  }
  for (char& address : end_) acquire(address);
  if (!failed() || !__asan_unpoison_memory_region) return;
  for (const Fiber& fiber : fibers_) __asan_unpoison_memory_region(fiber.bottom, fiber.size);
}

bool Processor::barrier(bool value, int line) {
  Fiber& mine = fibers_[current_];
  const unsigned parity = mine.barriers++ % 2;
  mine.line = line;
  release(meet_[parity]);
  any_[parity] = any_[parity] || value;
  at_barrier_.push_back(current_);
  if (at_barrier_.size() == fibers_.size()) {
    for (const unsigned other : at_barrier_) {
      if (fibers_[other].line == line) continue;
      fail("threads wait at barriers of line %d and of line %d", line, fibers_[other].line);
    }
    ready_.swap(at_barrier_);
    any_[1 - parity] = false;
  }
  next();
  acquire(meet_[parity]);
  return any_[parity];
}

uint64_t Processor::shuffle_xor(uint64_t value, int lanes, int line) {
  const unsigned partner = current_ ^ static_cast<unsigned>(lanes);
  if (partner / kWarp != current_ / kWarp || partner >= fibers_.size()) fail("shuffle out of the warp");
  Fiber& mine = fibers_[current_];
  const unsigned parity = mine.shuffles++ % 2;
  mine.posted[parity] = value;
  mine.line = line;
  mine.lanes = lanes;
  std::vector<unsigned>& warp = at_shuffle_[current_ / kWarp];
  warp.push_back(current_);
  if (warp.size() == kWarp) {
    for (const unsigned other : warp) {
      if (fibers_[other].line != line || fibers_[other].lanes != lanes) fail("lanes of a warp differ");
    }
    for (const unsigned lane : warp) ready_.push_back(lane);
    warp.clear();
  }
  next();
  return fibers_[partner].posted[parity];
}

}  // namespace

const char* launch(unsigned blocks, unsigned threads, size_t shared_bytes, int processors,
                   const Kernel& kernel) {
  static Processor all[2];
  for (Processor& each : all) each.failure[0] = 0;
  Random random{settings.seed};
  std::vector<unsigned> order(std::min(blocks, settings.max_blocks));
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  if (processors == 1) {
    all[0].run(order, 0, 1, threads, shared_bytes, kernel);
  } else {
    std::thread second([&] { all[1].run(order, 1, 2, threads, shared_bytes, kernel); });
    std::thread first([&] { all[0].run(order, 0, 2, threads, shared_bytes, kernel); });
    first.join();
    second.join();
  }
  for (const Processor& each : all) {
    if (each.failure[0] != 0) return each.failure;
  }
  return nullptr;
}

bool barrier(bool value, int line) { return here->barrier(value, line); }
uint64_t shuffle_xor(uint64_t value, int lanes, int line) {
  return here->shuffle_xor(value, lanes, line);
}
void pause() { here->pause(); }
void trap() { here->fail("a thread trapped"); }
void* dynamic_shared() { return here->shared(); }

}  // namespace emulator
