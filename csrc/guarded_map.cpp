#include "guarded_map.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>

namespace deit_fast {

// The address range of a map. Ranges stay in the list for ever and are used again, so the handler may
// walk the list at any moment.
struct GuardedRange {
  std::atomic<bool> taken{true};
  std::atomic<uintptr_t> begin{0};  // 0: no map
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> lost{false};
  GuardedRange* next = nullptr;
};

namespace {

static_assert(std::atomic<uintptr_t>::is_always_lock_free && std::atomic<bool>::is_always_lock_free,
              "a signal handler must not wait for a lock");

std::atomic<GuardedRange*> ranges{nullptr};
const auto page_bytes = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));

using Action = struct sigaction;
std::atomic<const Action*> first_action{nullptr};  // there before this handler
std::atomic<const Action*> last_action{nullptr};   // found at the last installation
std::atomic<pid_t> passing{0};  // the thread that is in another handler, called by this one

GuardedRange* range_of(uintptr_t address) {
  for (GuardedRange* range = ranges.load(); range != nullptr; range = range->next) {
    const uintptr_t begin = range->begin.load();
    if (begin == 0 || address < begin || address >= range->end.load()) continue;
    if (range->begin.load() == begin) return range;  // else it was given to another map meanwhile
  }
  return nullptr;
}

// Gives the signal to the handler that was there, as if this one were not. A handler that was
// installed later may itself call this one or send the signal again: the oldest decides then.
void pass_on(int number, siginfo_t* info, void* context) {
  const auto self = static_cast<pid_t>(::syscall(SYS_gettid));
  const bool is_nested = passing.exchange(self) == self;
  const bool is_sent = info->si_code <= 0;
  const bool is_own = is_sent && info->si_pid == ::getpid();
  const Action* action = is_nested || is_own ? first_action.load() : last_action.load();
  if (action->sa_handler == SIG_IGN && is_sent) {
  } else if (action->sa_handler == SIG_DFL || action->sa_handler == SIG_IGN) {
    ::signal(number, SIG_DFL);
    ::raise(number);
  } else if (action->sa_flags & SA_SIGINFO) {
    action->sa_sigaction(number, info, context);
  } else {
    action->sa_handler(number);
  }
  passing.store(0);
}

void on_bus_error(int number, siginfo_t* info, void* context) {
  const int code = errno;
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  GuardedRange* range = info->si_code > 0 ? range_of(address) : nullptr;
  if (range != nullptr) {
    range->lost.store(true);
    void* page = reinterpret_cast<void*>(address / page_bytes * page_bytes);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    if (::mmap(page, page_bytes, PROT_READ, flags, -1, 0) == MAP_FAILED) range = nullptr;
  }
  if (range == nullptr) pass_on(number, info, context);
  errno = code;
}

// Puts this handler first again where another one was installed meanwhile, such as Python's
// faulthandler.
void install_handler() {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  Action found{};
  if (::sigaction(SIGBUS, nullptr, &found) != 0 || found.sa_sigaction == on_bus_error) return;
  const Action* before = new Action(found);  // the handler may read an older one at any moment
  if (first_action.load() == nullptr) first_action.store(before);
  last_action.store(before);
  Action action{};
  action.sa_sigaction = on_bus_error;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(SIGBUS, &action, nullptr);
}

GuardedRange* take_range() {
  for (GuardedRange* range = ranges.load(); range != nullptr; range = range->next) {
    bool taken = false;
    if (range->taken.compare_exchange_strong(taken, true)) return range;
  }
  auto* range = new GuardedRange;
  range->next = ranges.load();
  while (!ranges.compare_exchange_weak(range->next, range)) {
  }
  return range;
}

}  // namespace

GuardedMap::GuardedMap(int fd, size_t size) : size_(size) {
  install_handler();
  range_ = take_range();
  void* map = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  if (map == MAP_FAILED) {
    range_->taken.store(false);
    return;
  }
  data_ = static_cast<const unsigned char*>(map);
  const auto begin = reinterpret_cast<uintptr_t>(map);
  range_->lost.store(false);
  range_->end.store(begin + (size + page_bytes - 1) / page_bytes * page_bytes);
  range_->begin.store(begin);
}

GuardedMap::~GuardedMap() {
  if (data_ == nullptr) return;
  range_->begin.store(0);
  ::munmap(const_cast<unsigned char*>(data_), size_);
  range_->taken.store(false);
}

bool GuardedMap::is_lost() const { return range_->lost.load(std::memory_order_acquire); }

void GuardedMap::mark_lost() const { range_->lost.store(true); }

}  // namespace deit_fast
