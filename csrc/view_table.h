// Gathering records of many open views, and reading their blocks ahead of time.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "logit_cache.h"
#include "record_codec.h"

namespace deit_fast {

using View = std::shared_ptr<const ViewReader>;

// The views that a batch touches, kept open, and the view of each of its records.
struct Located {
  std::vector<View> views;
  std::vector<uint32_t> which;  // [n] places in views
};

// Open views by id. Not for several threads at once (Python's lock guards it); what it returns is.
class ViewTable {
 public:
  void add(View view);
  // Finds the views of `count` ids, `stride` apart (0: one for all). Returns -1, or the first id
  // that is not in the table.
  int64_t locate(const int64_t* ids, size_t count, size_t stride, Located* out);
  // Closes the views that were used longest ago, down to `limit`.
  void trim(size_t limit);

 private:
  struct Slot {
    View view;
    uint64_t used = 0;
  };
  std::unordered_map<int64_t, Slot> slots_;
  uint64_t turn_ = 0;
};

// Decodes record rows[i] of view which[i] for every i. Rows are in range.
void gather(const Located& located, const int64_t* rows, size_t count, const RecordLayout& layout,
            const Decoded& out);

// Threads that read and check blocks before they are needed, in the order of asking. What they
// read stays in the system's page cache, which processes share; the process itself holds a buffer
// of a megabyte a thread. A damaged block is left for its reader to find.
class ReadAhead {
 public:
  explicit ReadAhead(size_t threads);
  ~ReadAhead() { stop(); }
  ReadAhead(const ReadAhead&) = delete;
  ReadAhead& operator=(const ReadAhead&) = delete;

  // Queues the blocks of these rows that are neither verified nor queued, in the files' order.
  void ask(const Located& located, const int64_t* rows, size_t count);
  void wait();  // until nothing is queued or in hand
  void stop();  // drops what is queued and waits for the threads, and so for the blocks in hand
  // False in a forked child: the threads did not come along, and a destructor would wait for them.
  bool is_mine() const;
  uint64_t blocks_read() const;

 private:
  using Block = std::pair<View, uint64_t>;
  void work();

  mutable std::mutex mutex_;
  std::condition_variable more_, idle_;
  // Blocks that the disk is asked for beforehand: 5 MB of the usual ones, as a disk likes it.
  static constexpr size_t kAdvised = 16;
  std::deque<Block> queue_;
  size_t advised_ = 0;  // so many of the queue's first
  std::set<std::pair<const ViewReader*, uint64_t>> asked_;  // queued or in hand
  uint64_t blocks_read_ = 0;
  bool stop_ = false;
  int pid_;
  std::vector<std::thread> threads_;
};

}  // namespace deit_fast
