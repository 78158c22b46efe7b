#include "logit_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "crc32c.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the cache format is little-endian and read without byte swaps"
#endif

namespace deit_fast {
namespace {

constexpr char kMagic[8] = {'D', 'F', 'L', 'O', 'G', 'I', 'T', '1'};
constexpr uint64_t kPage = 4096;
constexpr size_t kHeaderCrcOffset = 4092;
constexpr uint32_t kComplete = 0x454E4F44;  // the bytes "DONE"
constexpr size_t kEntryBytes = 8;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t table_offset;
  uint64_t num_records;
  uint32_t record_bytes;
  uint32_t block_records;
  uint64_t view_id;
  uint64_t data_offset;
  unsigned char manifest_sha256[32];
  unsigned char zeros[kHeaderCrcOffset - 80];
  uint32_t crc;
};
static_assert(sizeof(Header) == kPage, "the header is one page");
static_assert(offsetof(Header, crc) == kHeaderCrcOffset, "the header's checksum ends it");

[[noreturn]] void fail_io(const std::string& path, const std::string& note, int code = errno) {
  throw IoError(code, path, note);
}

BlockState state_of(uint32_t word) {
  if (word == 0) return BlockState::pending;
  return word == kComplete ? BlockState::complete : BlockState::broken;
}

std::string hex(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

void read_exact(int fd, const std::string& path, void* out, size_t size, uint64_t offset) {
  auto* bytes = static_cast<unsigned char*>(out);
  while (size > 0) {
    const ssize_t got = ::pread(fd, bytes, size, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_io(path, "reading");
    if (got == 0) {
      throw FormatError(path + ": truncated: nothing to read at byte " + std::to_string(offset));
    }
    bytes += got;
    offset += static_cast<uint64_t>(got);
    size -= static_cast<size_t>(got);
  }
}

void write_exact(int fd, const std::string& path, const void* data, size_t size, uint64_t offset) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  while (size > 0) {
    const ssize_t put = ::pwrite(fd, bytes, size, static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) fail_io(path, "writing");
    bytes += put;
    offset += static_cast<uint64_t>(put);
    size -= static_cast<size_t>(put);
  }
}

Header make_header(const ViewSpec& spec) {
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = spec.version;
  header.table_offset = kPage;
  header.num_records = spec.num_records;
  header.record_bytes = spec.record_bytes;
  header.block_records = spec.block_records;
  header.view_id = spec.view_id;
  header.data_offset = spec.data_offset();
  std::memcpy(header.manifest_sha256, spec.manifest_sha256.data(), 32);
  header.crc = crc32c(&header, kHeaderCrcOffset);
  return header;
}

void check_header(const std::string& path, const Header& header, const ViewSpec& spec) {
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) {
    throw FormatError(path + ": not a view file (it does not start with DFLOGIT1)");
  }
  const uint32_t crc = crc32c(&header, kHeaderCrcOffset);
  if (crc != header.crc) {
    throw FormatError(path + ": header is damaged (checksum " + hex(crc) + ", stored " +
                      hex(header.crc) + ")");
  }
  const auto expect = [&](const char* field, uint64_t found, uint64_t expected) {
    if (found == expected) return;
    throw FormatError(path + ": header has " + field + " " + std::to_string(found) +
                      ", expected " + std::to_string(expected));
  };
  expect("format version", header.version, spec.version);
  expect("view_id", header.view_id, spec.view_id);
  expect("num_records", header.num_records, spec.num_records);
  expect("record_bytes", header.record_bytes, spec.record_bytes);
  expect("block_records", header.block_records, spec.block_records);
  expect("block table offset", header.table_offset, kPage);
  expect("data_offset", header.data_offset, spec.data_offset());
  if (std::memcmp(header.manifest_sha256, spec.manifest_sha256.data(), 32) != 0) {
    throw FormatError(path + ": was written under another manifest (SHA-256 differs)");
  }
  const Header expected = make_header(spec);
  if (std::memcmp(&header, &expected, sizeof header) != 0) {
    throw FormatError(path + ": header is damaged (bytes that must be zero are not)");
  }
}

// The largest class id of some records, in a loop without a branch, which vectorises: every block
// of an epoch is checked here.
template <typename Id>
uint32_t largest_id(const ViewSpec& spec, const unsigned char* records, size_t count) {
  Id largest = 0;
  for (size_t record = 0; record < count; ++record, records += spec.record_bytes) {
    Id of_record = 0;  // a local per record: a block of 4096 takes 72 us, else 102
    for (uint32_t i = 0; i < spec.ids_per_record; ++i) {
      Id id;
      std::memcpy(&id, records + i * sizeof(Id), sizeof(Id));
      of_record = std::max(of_record, id);
    }
    largest = std::max(largest, of_record);
  }
  return largest;
}

// Makes the name of a new file survive a power failure. Some file systems cannot sync a folder.
void sync_folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  ::fsync(fd);
  ::close(fd);
}

struct stat status_of(int fd, const std::string& path) {
  struct stat status {};
  if (::fstat(fd, &status) != 0) fail_io(path, "asking for the size");
  return status;
}

// When the file was changed, ns: by a write, a new size or new rights. Unlike the time of the last
// write, no program can set it.
int64_t change_time(const struct stat& status) {
  return int64_t{status.st_ctim.tv_sec} * 1000000000 + status.st_ctim.tv_nsec;
}

void check_size(const struct stat& status, const std::string& path, const ViewSpec& spec) {
  const auto size = static_cast<uint64_t>(status.st_size);
  if (size == spec.file_bytes()) return;
  throw FormatError(path + ": has " + std::to_string(size) + " bytes, expected " +
                    std::to_string(spec.file_bytes()));
}

// Removes a temporary file at the end of a scope.
struct TemporaryFile {
  int fd;
  const std::string& name;

  ~TemporaryFile() {
    ::close(fd);
    ::unlink(name.c_str());
  }
};

// Descriptor of a new file that is locked, so that remove_orphans of another process leaves it. If
// that process was faster than the lock, the file has lost its name.
int create_locked(const std::string& path, const std::string& temporary) {
  while (true) {
    const int fd = ::open(temporary.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0) fail_io(path, "creating a temporary file beside it");
    ::flock(fd, LOCK_EX);  // an error: a file system without locks, where no orphan is deleted
    struct stat status {};
    if (::fstat(fd, &status) != 0 || status.st_nlink > 0) return fd;
    ::close(fd);
  }
}

// Holds the lock of one table entry, so that processes which write one block do it one after another.
// The system releases it when the descriptor or its process ends. Without locks in the file system
// nothing is held: equal bytes, written twice, harm nobody.
class EntryLock {
 public:
  EntryLock(int fd, uint64_t offset) : fd_(fd), offset_(offset) { set(F_WRLCK); }
  ~EntryLock() { set(F_UNLCK); }
  EntryLock(const EntryLock&) = delete;
  EntryLock& operator=(const EntryLock&) = delete;

 private:
  void set(short type) {
    struct flock lock {};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = static_cast<off_t>(offset_);
    lock.l_len = kEntryBytes;
    while (::fcntl(fd_, F_OFD_SETLKW, &lock) != 0 && errno == EINTR) {
    }
  }

  int fd_;
  uint64_t offset_;
};

// Creates a view without complete blocks under the unused name `temporary` and links it to `path`,
// unless a file is there already. Returns `path`.
const std::string& create_or_keep(const std::string& path, const std::string& temporary,
                                  const ViewSpec& spec, bool reserve) {
  spec.check();
  if (::access(path.c_str(), F_OK) == 0) return path;
  const int fd = create_locked(path, temporary);
  const TemporaryFile file{fd, temporary};
  const auto size = static_cast<off_t>(spec.file_bytes());
  int code = 0;
  do {
    if (reserve) {
      code = ::posix_fallocate(fd, 0, size);
    } else {
      code = ::ftruncate(fd, size) == 0 ? 0 : errno;
    }
  } while (code == EINTR);
  if (code != 0) {
    fail_io(path, "a view needs " + std::to_string(spec.file_bytes()) + " bytes", code);
  }
  const Header header = make_header(spec);
  write_exact(fd, path, &header, sizeof header, 0);
  if (::fsync(fd) != 0) fail_io(path, "syncing");
  if (::link(temporary.c_str(), path.c_str()) != 0 && errno != EEXIST) fail_io(path, "linking");
  sync_folder_of(path);
  return path;
}

}  // namespace

void ViewSpec::check() const {
  if (num_records == 0 || record_bytes == 0 || block_records == 0) {
    throw FormatError("a view needs at least one record of at least one byte in a block");
  }
  // 2^40 records of at most 2^21 bytes: every offset below fits 62 bits.
  if (num_records > (uint64_t{1} << 40) || record_bytes > (1u << 21) ||
      block_records > (1u << 31)) {
    throw FormatError("a view holds at most 2^40 records of 2^21 bytes, in blocks of 2^31");
  }
  if (version != 2 && version != 3) {
    throw FormatError("format " + std::to_string(version) + "; this build knows 2 and 3");
  }
  if ((id_bytes != 2 && id_bytes != 4) || uint64_t{ids_per_record} * id_bytes > record_bytes) {
    throw FormatError("a record's class ids take 2 or 4 bytes each and lie inside it");
  }
}

uint64_t ViewSpec::data_offset() const {
  const uint64_t table_end = kPage + blocks() * kEntryBytes;
  return (table_end + kPage - 1) / kPage * kPage;
}

std::string ViewSpec::header() const {
  const Header header = make_header(*this);
  return std::string(reinterpret_cast<const char*>(&header), sizeof header);
}

uint64_t ViewSpec::block_offset(uint64_t block) const {
  return data_offset() + block * block_records * record_bytes;
}

uint64_t ViewSpec::block_bytes(uint64_t block) const {
  const uint64_t start = block * block_records;
  return std::min<uint64_t>(block_records, num_records - start) * record_bytes;
}

uint32_t ViewSpec::place_crc(uint64_t block) const {
  if (version < 3) return 0;
  const uint64_t place[2] = {view_id, block};
  return crc32c(place, sizeof place, crc32c(manifest_sha256.data(), manifest_sha256.size()));
}

ViewFile::ViewFile(std::string path, const ViewSpec& spec, bool writable)
    : path_(std::move(path)), spec_(spec) {
  spec_.check();
  // O_NONBLOCK: a FIFO would wait for its other end.
  const int flags = (writable ? O_RDWR : O_RDONLY) | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
  fd_ = ::open(path_.c_str(), flags);
  if (fd_ < 0) fail_io(path_, "opening");
  try {
    const struct stat status = status_of(fd_, path_);
    if (!S_ISREG(status.st_mode)) throw FormatError(path_ + ": is not a regular file");
    Header header{};
    read_exact(fd_, path_, &header, sizeof header, 0);
    check_header(path_, header, spec_);
    check_size(status, path_, spec_);
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

ViewFile::~ViewFile() { ::close(fd_); }

std::string ViewFile::name(uint64_t block) const {
  return path_ + ": view " + std::to_string(spec_.view_id) + " block " + std::to_string(block);
}

ViewFile::Entry ViewFile::read_entry(uint64_t block) const {
  static_assert(sizeof(Entry) == kEntryBytes, "a table entry is two words");
  if (block >= spec_.blocks()) {
    throw FormatError(name(block) + " does not exist; the view has " +
                      std::to_string(spec_.blocks()) + " blocks");
  }
  Entry entry{};
  read_exact(fd_, path_, &entry, sizeof entry, kPage + block * kEntryBytes);
  return entry;
}

std::vector<BlockState> ViewFile::table_states() const {
  std::vector<Entry> entries(spec_.blocks());
  read_exact(fd_, path_, entries.data(), entries.size() * kEntryBytes, kPage);
  std::vector<BlockState> states;
  states.reserve(entries.size());
  for (const Entry& entry : entries) states.push_back(state_of(entry.state));
  return states;
}

std::optional<uint64_t> ViewFile::first_incomplete() const {
  const std::vector<BlockState> states = table_states();
  const auto broken = std::find(states.begin(), states.end(), BlockState::broken);
  if (broken != states.end()) {
    throw FormatError(check_block(static_cast<uint64_t>(broken - states.begin())).second);
  }
  const auto pending = std::find(states.begin(), states.end(), BlockState::pending);
  if (pending == states.end()) return std::nullopt;
  return static_cast<uint64_t>(pending - states.begin());
}

std::pair<BlockState, std::string> ViewFile::check_block(uint64_t block) const {
  const Entry entry = read_entry(block);
  const BlockState state = state_of(entry.state);
  if (state == BlockState::pending) return {state, ""};
  if (state == BlockState::broken) {
    return {state, name(block) + " has the invalid state " + hex(entry.state)};
  }
  // Reads the file rather than the map: a bad sector or a truncated file is an error here, and
  // would be a signal there. Reads chunks that fit into the core's own cache and need no new pages.
  const uint64_t record_bytes = spec_.record_bytes;
  // A chunk has whole records where their ids are checked.
  const uint64_t unit = spec_.ids_per_record > 0 ? record_bytes : 1;
  const uint64_t chunk = std::max<uint64_t>(1, (1 << 16) / unit) * unit;
  std::vector<unsigned char> buffer(std::min(spec_.block_bytes(block), chunk));
  uint64_t offset = spec_.block_offset(block);
  uint64_t left = spec_.block_bytes(block);
  const auto largest_of = spec_.id_bytes == 2 ? largest_id<uint16_t> : largest_id<uint32_t>;
  uint32_t crc = spec_.place_crc(block), largest = 0;
  while (left > 0) {
    const size_t size = std::min<uint64_t>(left, buffer.size());
    read_exact(fd_, path_, buffer.data(), size, offset);
    crc = crc32c(buffer.data(), size, crc);
    if (spec_.ids_per_record > 0) {
      largest = std::max(largest, largest_of(spec_, buffer.data(), size / record_bytes));
    }
    offset += size;
    left -= size;
  }
  if (crc != entry.crc) {
    const char* const fault = spec_.version < 3 ? " is damaged" : " is damaged or of another place";
    return {BlockState::broken, name(block) + fault + " (checksum " + hex(crc) + ", stored " +
                                    hex(entry.crc) + ")"};
  }
  if (spec_.ids_per_record > 0 && largest >= spec_.id_limit) {
    return {BlockState::broken, name(block) + " holds class id " + std::to_string(largest) +
                                    " of " + std::to_string(spec_.id_limit) + " classes"};
  }
  return {BlockState::complete, ""};
}

ViewWriter::ViewWriter(const std::string& path, const std::string& temporary, const ViewSpec& spec,
                       bool reserve)
    : ViewFile(create_or_keep(path, temporary, spec, reserve), spec, true) {}

Committed ViewWriter::commit(uint64_t block, const void* data, size_t size) {
  const uint64_t table_offset = kPage + block * kEntryBytes;
  read_entry(block);  // refuses a block that the view does not have
  if (size != spec_.block_bytes(block)) {
    throw FormatError(name(block) + " takes " + std::to_string(spec_.block_bytes(block)) +
                      " bytes, not " + std::to_string(size));
  }
  const uint32_t crc = crc32c(data, size, spec_.place_crc(block));
  const EntryLock lock(fd_, table_offset);
  const Entry before = read_entry(block);
  if (check_block(block).first == BlockState::complete) {
    require_named();
    return before.crc == crc ? Committed::kept : Committed::kept_others;
  }
  if (before.state != 0 || before.crc != 0) {  // a broken block: clear its entry first
    const Entry none{0, 0};
    write_exact(fd_, path_, &none, sizeof none, table_offset);
  }
  write_exact(fd_, path_, data, size, spec_.block_offset(block));
  if (::fdatasync(fd_) != 0) fail_io(path_, "syncing");
  const Entry done{crc, kComplete};
  write_exact(fd_, path_, &done, sizeof done, table_offset);
  require_named();
  return Committed::written;
}

void ViewWriter::sync() const {
  if (::fdatasync(fd_) != 0) fail_io(path_, "syncing");
  require_named();
}

void ViewWriter::require_named() const {
  const struct stat open = status_of(fd_, path_);
  struct stat named {};
  const bool is_there = ::stat(path_.c_str(), &named) == 0;
  if (!is_there && errno != ENOENT && errno != ENOTDIR) fail_io(path_, "looking for the file");
  if (is_there && named.st_dev == open.st_dev && named.st_ino == open.st_ino) return;
  throw FormatError(path_ + ": was " + (is_there ? "replaced" : "deleted") +
                    " while it was written, so its new blocks are lost: write them again");
}

ViewReader::ViewReader(const std::string& path, const ViewSpec& spec, bool is_growing)
    : ViewFile(path, spec, false),
      map_(fd_, spec.file_bytes()),
      verified_(new std::atomic<uint32_t>[spec.blocks()]()),
      record_bytes_(spec.record_bytes),
      is_growing_(is_growing),
      changed_(change_time(status_of(fd_, path))) {
  if (map_.data() == nullptr) fail_io(path_, "mapping");
  data_ = map_.data() + spec_.data_offset();
  const uint32_t records = spec_.block_records;
  if ((records & (records - 1)) == 0) shift_ = __builtin_ctz(records);
}

void ViewReader::refresh() const {
  const struct stat status = status_of(fd_, path_);
  if (static_cast<uint64_t>(status.st_size) != spec_.file_bytes()) map_.mark_lost();
  check_size(status, path_, spec_);
  if (map_.is_lost()) {
    throw FormatError(path_ + ": was cut off or could not be read while it was in use");
  }
  const int64_t changed = change_time(status);
  if (is_growing_ || changed == changed_.load(std::memory_order_acquire)) return;
  // In this order: a thread that finds the new time must find the new generation.
  generation_.fetch_add(1);
  changed_.store(changed, std::memory_order_release);
}

void ViewReader::require_block(uint64_t block) const {
  const uint32_t now = generation();
  if (verified_[block].load(std::memory_order_relaxed) == now) return;
  // Two threads may check the same block at once, with the same result.
  const auto [state, why] = check_block(block);
  if (state == BlockState::pending) throw FormatError(name(block) + " is not written yet");
  if (state == BlockState::broken) throw FormatError(why);
  verified_[block].store(now, std::memory_order_relaxed);
}

void ViewReader::map_pages(uint64_t block) const {
#ifdef MADV_POPULATE_READ
  const auto begin = reinterpret_cast<uintptr_t>(map_.data()) + spec_.block_offset(block);
  const uintptr_t first = begin / kPage * kPage;
  const uintptr_t end = (begin + spec_.block_bytes(block) + kPage - 1) / kPage * kPage;
  // A failure costs page faults only.
  ::madvise(reinterpret_cast<void*>(first), end - first, MADV_POPULATE_READ);
#else
  (void)block;
#endif
}

void ViewReader::will_need(uint64_t block) const {
  ::posix_fadvise(fd_, static_cast<off_t>(spec_.block_offset(block)),
                  static_cast<off_t>(spec_.block_bytes(block)), POSIX_FADV_WILLNEED);
}

void ViewReader::will_need_records(uint64_t first, uint64_t count) const {
  const uint64_t record_bytes = spec_.record_bytes;
  ::posix_fadvise(fd_, static_cast<off_t>(spec_.data_offset() + first * record_bytes),
                  static_cast<off_t>(count * record_bytes), POSIX_FADV_WILLNEED);
}

}  // namespace deit_fast
