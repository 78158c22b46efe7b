#include "view_table.h"

#include <algorithm>

namespace deit_fast {

void ViewTable::add(View view) {
  const auto id = static_cast<int64_t>(view->spec().view_id);
  Slot& slot = slots_[id];
  // Another thread may have opened it meanwhile. Its view knows which blocks are verified.
  if (slot.view == nullptr || slot.view->is_lost()) slot.view = std::move(view);
  slot.used = ++turn_;
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
        if (slot == slots_.end() || slot->second.view->is_lost()) return id;
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

namespace {

constexpr int kAttempts = 4;

uint64_t generations(const std::vector<View>& views) {
  uint64_t sum = 0;
  for (const View& view : views) sum += view->generation();
  return sum;
}

void read_records(const Located& located, const int64_t* rows, size_t count,
                  const RecordLayout& layout, const Decoded& out) {
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

}  // namespace

void gather(const Located& located, const int64_t* rows, size_t count, const RecordLayout& layout,
            const Decoded& out) {
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const uint64_t before = generations(located.views);
    read_records(located, rows, count, layout, out);
    for (const View& view : located.views) view->refresh();
    if (generations(located.views) == before) return;
  }
  throw FormatError(located.views.front()->path() + ": it or another view is being written");
}

std::vector<std::pair<View, uint64_t>> unread_blocks(const Located& located, const int64_t* rows,
                                                     size_t count) {
  std::vector<std::pair<uint32_t, uint64_t>> found;
  for (size_t i = 0; i < count; ++i) {
    const ViewReader& view = *located.views[located.which[i]];
    const uint64_t block = view.block_of(static_cast<uint64_t>(rows[i]));
    if (!view.is_verified(block)) found.emplace_back(located.which[i], block);
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  std::vector<std::pair<View, uint64_t>> blocks;
  for (const auto& [view, block] : found) blocks.emplace_back(located.views[view], block);
  return blocks;
}

size_t will_need_records(const Located& located, const int64_t* rows, size_t count) {
  std::vector<std::pair<uint32_t, uint64_t>> found;
  for (size_t i = 0; i < count; ++i) {
    const auto row = static_cast<uint64_t>(rows[i]);
    const ViewReader& view = *located.views[located.which[i]];
    if (view.is_verified(view.block_of(row))) found.emplace_back(located.which[i], row);
  }
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  size_t ranges = 0;
  for (size_t begin = 0, end = 0; begin < found.size(); begin = end, ++ranges) {
    const auto [view, first] = found[begin];
    while (end < found.size() && found[end] == std::pair{view, first + (end - begin)}) ++end;
    located.views[view]->will_need_records(first, end - begin);
  }
  return ranges;
}

}  // namespace deit_fast
