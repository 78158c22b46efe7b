#include "view_table.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>

namespace deit_fast {

void ViewTable::add(View view) {
  const auto id = static_cast<int64_t>(view->spec().view_id);
  slots_[id] = Slot{std::move(view), ++turn_};
}

int64_t ViewTable::locate(const int64_t* ids, size_t count, size_t stride, Located* out) {
  out->views.clear();
  if (count == 0) return -1;
  out->which.resize(count);
  ++turn_;
  // A batch has few views: a small direct-mapped table finds the view of nearly every row.
  constexpr size_t kRecent = 64;
  int64_t recent_ids[kRecent];
  uint32_t recent_indices[kRecent];
  std::fill(recent_ids, recent_ids + kRecent, int64_t{-1});
  std::unordered_map<int64_t, uint32_t> indices;
  const size_t distinct_rows = stride == 0 ? 1 : count;
  for (size_t i = 0; i < distinct_rows; ++i) {
    const int64_t id = ids[i];
    const size_t recent = static_cast<uint64_t>(id) % kRecent;
    if (recent_ids[recent] != id || id < 0) {
      const auto [entry, added] = indices.try_emplace(id, static_cast<uint32_t>(out->views.size()));
      if (added) {
        const auto slot = slots_.find(id);
        if (slot == slots_.end()) return id;
        slot->second.used = turn_;
        out->views.push_back(slot->second.view);
      }
      recent_ids[recent] = id;
      recent_indices[recent] = entry->second;
    }
    out->which[i] = recent_indices[recent];
  }
  return -1;
}

void ViewTable::trim(size_t limit) {
  while (slots_.size() > limit) {
    const auto oldest = std::min_element(slots_.begin(), slots_.end(), [](auto& a, auto& b) {
      return a.second.used < b.second.used;
    });
    slots_.erase(oldest);
  }
}

void gather(const Located& located, const int64_t* rows, size_t count, const RecordLayout& layout,
            const Decoded& out) {
  for (const View& view : located.views) {
    view->check_unchanged();  // a file truncated since it was opened: an error, not a SIGBUS
  }
  // Random records miss every cache. find prefetches one batch of records while the batch before it
  // is decoded.
  const unsigned char* records[2][kDecodeBatch];
  const auto find = [&](size_t begin, const unsigned char** found) {
    const size_t size = std::min(kDecodeBatch, count - begin);
    for (size_t i = 0; i < size; ++i) {
      const ViewReader& view = *located.views[located.which[begin + i]];
      found[i] = view.record(rows[begin + i]);
      __builtin_prefetch(found[i]);
      __builtin_prefetch(found[i] + layout.record_bytes - 1);
    }
    return size;
  };
  if (count == 0) return;
  size_t size = find(0, records[0]);
  for (size_t begin = 0, turn = 0; begin < count; turn ^= 1) {
    const size_t next = begin + size;
    const size_t next_size = next < count ? find(next, records[turn ^ 1]) : 0;
    decode_batch(layout, records[turn], size, out, begin);
    begin = next;
    size = next_size;
  }
}

ReadAhead::ReadAhead(size_t threads) : pid_(::getpid()) {
  for (size_t i = 0; i < threads; ++i) {
    threads_.emplace_back([this] { work(); });
#ifdef __linux__
    pthread_setname_np(threads_.back().native_handle(), "dlc-read-ahead");  // for top and gdb
#endif
  }
}

bool ReadAhead::is_mine() const { return ::getpid() == pid_; }

void ReadAhead::stop() {
  if (!is_mine()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    queue_.clear();
    advised_ = 0;
  }
  more_.notify_all();
  idle_.notify_all();
  for (std::thread& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

void ReadAhead::ask(const Located& located, const int64_t* rows, size_t count) {
  std::vector<std::pair<uint32_t, uint64_t>> blocks;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t view_index = located.which[i];
    const ViewReader& view = *located.views[view_index];
    const uint64_t block = view.block_of(static_cast<uint64_t>(rows[i]));
    if (!view.is_verified(block)) blocks.emplace_back(view_index, block);
  }
  std::sort(blocks.begin(), blocks.end());
  blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [view_index, block] : blocks) {
      const View& view = located.views[view_index];
      if (asked_.emplace(view.get(), block).second) queue_.emplace_back(view, block);
    }
  }
  more_.notify_all();
}

void ReadAhead::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  idle_.wait(lock, [this] { return asked_.empty() || stop_; });
}

uint64_t ReadAhead::blocks_read() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return blocks_read_;
}

void ReadAhead::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    more_.wait(lock, [this] { return stop_ || !queue_.empty(); });
    if (stop_) return;
    const Block mine = std::move(queue_.front());
    queue_.pop_front();
    if (advised_ > 0) --advised_;
    std::vector<Block> next;  // the disk reads these while this thread checks its block
    for (; advised_ < std::min(kAdvised, queue_.size()); ++advised_) {
      next.push_back(queue_[advised_]);
    }
    lock.unlock();
    for (const auto& [view, block] : next) view->will_need(block);
    bool read = true;
    try {
      mine.first->require_block(mine.second);
      mine.first->map_pages(mine.second);
    } catch (const std::exception&) {
      read = false;  // the reader of one of its records raises the same error
    }
    lock.lock();
    blocks_read_ += read;
    asked_.erase({mine.first.get(), mine.second});
    if (asked_.empty()) idle_.notify_all();
  }
}

}  // namespace deit_fast
