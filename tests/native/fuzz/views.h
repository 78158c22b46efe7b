// View files that may be damaged, and what must hold when they are read or continued.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <memory>

#include "harness.h"

namespace deit_fast {

using Bytes = std::vector<unsigned char>;

// A file in memory that the code under test opens by name.
class MemoryFile {
 public:
  MemoryFile() : fd_(::memfd_create("fuzz", 0)) { require(fd_ >= 0, "no memfd"); }
  ~MemoryFile() { ::close(fd_); }
  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }
  void fill(const Bytes& bytes) {
    require(::ftruncate(fd_, 0) == 0 && ::ftruncate(fd_, static_cast<off_t>(bytes.size())) == 0 &&
                ::pwrite(fd_, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()),
            "no memory for the input");
  }

 private:
  int fd_;
};

inline void put(Bytes& bytes, size_t offset, uint64_t value, size_t size) {
  if (offset + size <= bytes.size()) std::memcpy(bytes.data() + offset, &value, size);
}

// A valid file made after docs/cache-format.md, not by the writer, whose faults the reader may share.
inline Bytes valid_file(const Shape& shape, Random& random) {
  const ViewSpec& spec = shape.spec;
  Bytes bytes(spec.file_bytes());
  std::memcpy(bytes.data(), "DFLOGIT1", 8);
  put(bytes, 8, spec.version, 4);
  put(bytes, 12, 4096, 4);
  put(bytes, 16, spec.num_records, 8);
  put(bytes, 24, spec.record_bytes, 4);
  put(bytes, 28, spec.block_records, 4);
  put(bytes, 32, spec.view_id, 8);
  put(bytes, 40, spec.data_offset(), 8);
  std::memcpy(bytes.data() + 48, spec.manifest_sha256.data(), 32);
  const Bytes records = make_records(shape, random, make_logits(shape, random));
  std::memcpy(bytes.data() + spec.data_offset(), records.data(), records.size());
  return bytes;
}

inline void repair_header(Bytes& bytes) {
  if (bytes.size() >= 4096) put(bytes, 4092, crc32c(bytes.data(), 4092), 4);
}

// The checksum of a block in its place, by the other implementation.
inline uint32_t block_crc(const ViewSpec& spec, uint64_t block, const unsigned char* data) {
  uint32_t crc = 0;
  if (spec.version == 3) {
    Bytes place(48);
    std::memcpy(place.data(), spec.manifest_sha256.data(), 32);
    put(place, 32, spec.view_id, 8);
    put(place, 40, block, 8);
    crc = crc32c_table(place.data(), place.size());
  }
  return crc32c_table(data, spec.block_bytes(block), crc);
}

inline void repair_blocks(const ViewSpec& spec, Bytes& bytes) {
  for (uint64_t block = 0; block < spec.blocks(); ++block) {
    const uint64_t start = spec.block_offset(block), size = spec.block_bytes(block);
    if (start + size > bytes.size()) return;
    put(bytes, 4096 + 8 * block, block_crc(spec, block, bytes.data() + start), 4);
    put(bytes, 4100 + 8 * block, 0x454E4F44, 4);
  }
}

// Whether docs/cache-format.md allows to read the block.
inline bool is_whole(const ViewSpec& spec, const Bytes& bytes, uint64_t block) {
  const unsigned char* data = bytes.data() + spec.block_offset(block);
  uint32_t entry[2];
  std::memcpy(entry, bytes.data() + 4096 + 8 * block, 8);
  if (entry[1] != 0x454E4F44 || entry[0] != block_crc(spec, block, data)) return false;
  const uint64_t records = spec.block_bytes(block) / spec.record_bytes;
  for (uint64_t i = 0; i < records * spec.ids_per_record; ++i) {
    uint32_t id = 0;
    std::memcpy(&id,
                data + i / spec.ids_per_record * spec.record_bytes +
                    i % spec.ids_per_record * spec.id_bytes,
                spec.id_bytes);
    if (id >= spec.id_limit) return false;
  }
  return true;
}

// Reads everything and returns whether all blocks are valid. `header`: the only valid header.
inline bool read_all(const std::string& path, const Bytes& bytes, const Bytes& header, const Shape& shape,
              Random& random) {
  const ViewSpec& spec = shape.spec;
  const auto view = std::make_shared<ViewReader>(path, spec);
  require(bytes.size() == spec.file_bytes(), "a file of another size was opened");
  require(std::equal(header.begin(), header.end(), bytes.begin()), "another header was accepted");
  const std::vector<BlockState> states = view->table_states();
  std::vector<bool> good(spec.blocks());
  bool all = true;
  for (uint64_t block = 0; block < spec.blocks(); ++block) {
    const auto [state, why] = view->check_block(block);
    good[block] = state == BlockState::complete;
    all = all && good[block];
    require(good[block] == is_whole(spec, bytes, block), "whole or not");
    require(!good[block] || states[block] == BlockState::complete, "complete against the table");
    require((state == BlockState::broken) == !why.empty(), "a broken block says why");
  }
  ViewTable table;
  table.add(view);
  const size_t count = 1 + random.below(40);
  std::vector<int64_t> rows(count), ids(count, static_cast<int64_t>(spec.view_id));
  bool readable = true;
  for (int64_t& row : rows) {
    row = static_cast<int64_t>(random.below(spec.num_records));
    readable = readable && good[view->block_of(static_cast<uint64_t>(row))];
  }
  Located located;
  require(table.locate(ids.data(), count, 1, &located) < 0, "an open view was not found");
  DecodedRecords decoded_records(shape.layout, count);
  try {
    gather(located, rows.data(), count, shape.layout, decoded_records.out);
    require(readable, "gather returned a block that is not complete");
    decoded_records.require_ids_below(shape.layout.num_classes);
  } catch (const FormatError&) {
    require(!readable, "gather refused whole blocks");
  }
  if (!all) return false;
  DecodedRecords straight(shape.layout, spec.num_records);
  decode_records(shape.layout, bytes.data() + spec.data_offset(), spec.num_records, straight.out);
  straight.require_ids_below(shape.layout.num_classes);
  for (size_t i = 0; i < count && shape.layout.kind == RecordKind::topk; ++i) {
    const auto row = static_cast<size_t>(rows[i]) * shape.layout.k;
    require(std::memcmp(&decoded_records.ids[i * shape.layout.k], &straight.ids[row], 4 * shape.layout.k) == 0,
            "gather and decode differ");
  }
  return true;
}

// A writer resumes the file: afterwards its block is complete, unless it refused the file at once.
inline void write_on(const std::string& path, const Shape& shape, Random& random) {
  ViewWriter writer(path, path, shape.spec);
  const uint64_t block = random.below(shape.spec.blocks());
  const Bytes records = make_records(shape, random, make_logits(shape, random));
  const uint64_t start = block * shape.spec.block_records * shape.spec.record_bytes;
  writer.commit(block, records.data() + start, shape.spec.block_bytes(block));
  require(writer.check_block(block).first == BlockState::complete, "a committed block is not whole");
}

}  // namespace deit_fast
