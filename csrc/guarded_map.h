// Memory maps that outlive a shortening of their file. The system sends SIGBUS to a thread that reads
// a page which the file has no longer, or which the disk fails to deliver. A handler then puts a page
// of zeros there and marks the map as lost, so that the reader can refuse what it read.
#pragma once

#include <cstddef>

namespace deit_fast {

struct GuardedRange;

// A read-only shared map of the first `size` bytes of a file.
class GuardedMap {
 public:
  // Installs the handler, unless it is there. `data()` is null where the system refuses the map, with
  // the reason in errno.
  GuardedMap(int fd, size_t size);
  ~GuardedMap();
  GuardedMap(const GuardedMap&) = delete;
  GuardedMap& operator=(const GuardedMap&) = delete;

  const unsigned char* data() const { return data_; }
  // Whether a page could not be read; then zeros may stand where the file has other bytes.
  bool is_lost() const;
  void mark_lost() const;

 private:
  const unsigned char* data_ = nullptr;
  size_t size_;
  GuardedRange* range_ = nullptr;
};

}  // namespace deit_fast
