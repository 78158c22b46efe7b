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

// The open views of a batch, and the view of each of its records.
struct Located {
  std::vector<View> views;
  std::vector<uint32_t> which;  // [n] indices into views
};

// Open views by id. Not thread-safe (Python's lock guards it); the views that it returns are.
class ViewTable {
 public:
  void add(View view);
  // Finds the views of `count` ids, `stride` apart (0: one id for all). Returns -1, or the first id
  // that is not in the table.
  int64_t locate(const int64_t* ids, size_t count, size_t stride, Located* out);
  // Closes the least recently used views until `limit` are open.
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

// Threads that read and verify blocks ahead of their use, in the order of the requests. The data
// stays in the system's page cache, which processes share. A damaged block is reported by its
// reader.
class ReadAhead {
 public:
  explicit ReadAhead(size_t threads);
  ~ReadAhead() { stop(); }
  ReadAhead(const ReadAhead&) = delete;
  ReadAhead& operator=(const ReadAhead&) = delete;

  // Queues the blocks of these rows that are neither verified nor queued, in the files' order.
  void ask(const Located& located, const int64_t* rows, size_t count);
  void wait();  // until no block is queued or being read
  void stop();  // drops the queue and waits for the blocks being read
  // False in a forked child, which has none of the threads: a destructor would wait for them
  // forever.
  bool is_mine() const;
  uint64_t blocks_read() const;

 private:
  using Block = std::pair<View, uint64_t>;
  void work();

  mutable std::mutex mutex_;
  std::condition_variable more_, idle_;
  // Number of queued blocks that the system is asked to read in advance: 5 MB of usual blocks.
  static constexpr size_t kAdvised = 16;
  std::deque<Block> queue_;
  size_t advised_ = 0;  // of the first blocks in the queue
  std::set<std::pair<const ViewReader*, uint64_t>> asked_;  // queued or being read
  uint64_t blocks_read_ = 0;
  bool stop_ = false;
  int pid_;
  std::vector<std::thread> threads_;
};

}  // namespace deit_fast
