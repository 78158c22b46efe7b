// Gathering records of many open views.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "logit_cache.h"
#include "record_codec.h"

namespace deit_fast {

using View = std::shared_ptr<ViewReader>;

// The open views of a batch, and the view of each of its records.
struct Located {
  std::vector<View> views;
  std::vector<uint32_t> which;  // [n] indices into views
};

// Open views by id. Not thread-safe (Python's lock guards it); the views that it returns are.
class ViewTable {
 public:
  // Keeps a view of this id that is open already and has lost no bytes.
  void add(View view);
  // Finds the views of `count` ids, `stride` apart (0: one id for all). Returns -1, or the first id
  // that is not in the table, or whose view has lost bytes.
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

// Decodes record rows[i] of view which[i] for every i. Rows are in range. Reads them again if a file
// was changed meanwhile. Throws FormatError for a block that is not right and for a file that has lost
// bytes.
void gather(const Located& located, const int64_t* rows, size_t count, const RecordLayout& layout,
            const Decoded& out);

// The blocks of these rows that are not verified yet, each once, in the files' order.
std::vector<std::pair<View, uint64_t>> unread_blocks(const Located& located, const int64_t* rows,
                                                     size_t count);

// Asks the system to start reading the records of these rows whose blocks are verified, in the
// files' order, and does not wait. Returns the number of ranges of adjacent records.
size_t will_need_records(const Located& located, const int64_t* rows, size_t count);

}  // namespace deit_fast
