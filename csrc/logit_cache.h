// View files of the teacher-logit cache: fixed-size records in checksummed blocks.
// The format is specified in docs/cache-format.md. Plain C++17; knows nothing of Python or torch.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "errors.h"
#include "guarded_map.h"

namespace deit_fast {

// The layout of a view file, which its header repeats, and the valid class ids of its records.
struct ViewSpec {
  uint64_t num_records = 0;
  uint32_t record_bytes = 0;
  uint32_t block_records = 0;
  uint64_t view_id = 0;
  // A record starts with ids_per_record unsigned class ids, each below id_limit. The file stores
  // none of these three fields.
  uint32_t ids_per_record = 0;
  uint32_t id_bytes = 2;
  uint32_t id_limit = 0;
  std::array<unsigned char, 32> manifest_sha256{};
  uint32_t version = 3;  // of the format

  // Throws FormatError where a size is zero or does not fit 62 bits, or the version is unknown.
  void check() const;
  uint64_t blocks() const { return (num_records + block_records - 1) / block_records; }
  uint64_t data_offset() const;
  std::string header() const;  // the bytes of the file's first page
  uint64_t file_bytes() const { return data_offset() + num_records * record_bytes; }
  uint64_t block_offset(uint64_t block) const;
  uint64_t block_bytes(uint64_t block) const;
  // Where the checksum of a block starts: the CRC32C of manifest, view and block, so that the block
  // is right in its own place alone. 0 in format 2, which does not bind a block to its place.
  uint32_t place_crc(uint64_t block) const;
};

enum class BlockState : unsigned char { pending, complete, broken };

// What `commit` did: wrote the block, or kept the complete one that another process wrote meanwhile,
// with the same bytes or with others (another device rounds differently).
enum class Committed : unsigned char { written, kept, kept_others };

// An open view file whose size and header agree with its spec. Anything but a regular file is refused
// without waiting for it.
class ViewFile {
 public:
  ViewFile(std::string path, const ViewSpec& spec, bool writable);
  ~ViewFile();
  ViewFile(const ViewFile&) = delete;
  ViewFile& operator=(const ViewFile&) = delete;

  const ViewSpec& spec() const { return spec_; }
  const std::string& path() const { return path_; }

  // State of every block from the table alone; `broken`: a state word that no writer stores.
  std::vector<BlockState> table_states() const;
  // State after reading the block and checking its checksum and every class id: an id beyond the
  // limit would index past a student's logits. The text describes the fault of a broken block.
  std::pair<BlockState, std::string> check_block(uint64_t block) const;
  // The first block that is not complete, by the table. Throws FormatError for a broken state.
  std::optional<uint64_t> first_incomplete() const;

 protected:
  struct Entry {
    uint32_t crc;
    uint32_t state;
  };
  Entry read_entry(uint64_t block) const;
  std::string name(uint64_t block) const;

  std::string path_;
  ViewSpec spec_;
  int fd_ = -1;
};

// Writes whole blocks. Several processes may write blocks of one file at once, also the same ones.
class ViewWriter : public ViewFile {
 public:
  // Creates the file under the unused name `temporary` and links it to `path`, or opens the file
  // that is there already. `reserve`: a new file gets all its disk space now; else as it fills.
  ViewWriter(const std::string& path, const std::string& temporary, const ViewSpec& spec,
             bool reserve = true);

  // Writes the data first and, once it is on disk, the table entry. After an interrupted write the
  // block is pending or its checksum is wrong; it is never complete with wrong bytes. A complete
  // block stays as it is. Writers of one block wait for one another, where the file system has
  // locks. Throws FormatError if the path does not lead to the file any longer: the block is lost
  // then.
  Committed commit(uint64_t block, const void* data, size_t size);
  void sync() const;  // throws as `commit`

 private:
  void require_named() const;
};

// Reads records through a memory map. Verifies a block's checksum before it returns the first of
// its records, and again after the file was changed. Thread-safe.
class ViewReader : public ViewFile {
 public:
  // `is_growing`: other processes add blocks to the file, so that a change of it says nothing about
  // the verified ones.
  ViewReader(const std::string& path, const ViewSpec& spec, bool is_growing = false);

  // Address of the record in the map, after its block was verified.
  const unsigned char* record(int64_t row) const {
    const auto index = static_cast<uint64_t>(row);
    const uint64_t block = block_of(index);
    if (!is_verified(block)) require_block(block);
    return data_ + index * record_bytes_;
  }

  // Looks for changes of the file since the last call. Throws FormatError if it has lost bytes: such a
  // reader stays refused, for its map may hold zeros.
  void refresh() const;
  // Grows when `refresh` finds a change. What was read is right if this number is the same before the
  // reading and after a `refresh` that follows it.
  uint32_t generation() const { return generation_.load(std::memory_order_acquire); }
  bool is_lost() const { return map_.is_lost(); }

  // Reads a block into the page cache and verifies its checksum, unless it is verified already.
  void require_block(uint64_t block) const;
  // Publishes no memory, so it needs no order: the bytes are the file's.
  bool is_verified(uint64_t block) const {
    return verified_[block].load(std::memory_order_relaxed) ==
           generation_.load(std::memory_order_relaxed);
  }
  // Asks the system to start reading a block and does not wait for it.
  void will_need(uint64_t block) const;
  void will_need_records(uint64_t first, uint64_t count) const;
  // Maps the pages of a block that is in memory, which saves its readers the page faults.
  void map_pages(uint64_t block) const;

  uint64_t block_of(uint64_t row) const {
    return shift_ >= 0 ? row >> shift_ : row / spec_.block_records;
  }

 private:
  GuardedMap map_;
  // What `record` reads, side by side.
  const unsigned char* data_ = nullptr;
  // By block: the generation of the file in which it was verified.
  std::unique_ptr<std::atomic<uint32_t>[]> verified_;
  mutable std::atomic<uint32_t> generation_{1};
  uint32_t record_bytes_;
  bool is_growing_;
  // log2 of block_records if that is a power of two: a division costs as much as a copy.
  int shift_ = -1;
  mutable std::atomic<int64_t> changed_;  // when, ns; of this generation
};

}  // namespace deit_fast
