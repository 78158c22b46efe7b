// Mutated view files through everything in csrc/ that reads bytes it did not write: header, block
// table, checksums, class ids, decoding of every codec, and a writer that goes on with such a file.
// Half of the inputs have their checksums put right again, or none would get past the header.
//
//   fuzz SECONDS [SEED [NUMBER]]
//
// Build with -fsanitize=address,undefined. The same seed gives the same inputs; NUMBER runs one.
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "harness.h"

using namespace deit_fast;

namespace {

using Bytes = std::vector<unsigned char>;

uint64_t seed = 1, number = 0;

void say_which() {
  std::fprintf(stderr, "at input %llu of seed %llu: fuzz 0 %llu %llu shows it again\n",
               static_cast<unsigned long long>(number), static_cast<unsigned long long>(seed),
               static_cast<unsigned long long>(seed), static_cast<unsigned long long>(number));
}

// A file that lives in memory; the code under test opens it by its name.
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

void put(Bytes& bytes, size_t place, uint64_t value, size_t size) {
  if (place + size <= bytes.size()) std::memcpy(bytes.data() + place, &value, size);
}

// A whole file by docs/cache-format.md, not by the writer: what is wrong in both would hide.
Bytes valid_file(const Shape& shape, Random& random) {
  const ViewSpec& spec = shape.spec;
  Bytes bytes(spec.file_bytes());
  std::memcpy(bytes.data(), "DFLOGIT1", 8);
  put(bytes, 8, 2, 4);
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

void repair_header(Bytes& bytes) {
  if (bytes.size() >= 4096) put(bytes, 4092, crc32c(bytes.data(), 4092), 4);
}

void repair_blocks(const ViewSpec& spec, Bytes& bytes) {
  for (uint64_t block = 0; block < spec.blocks(); ++block) {
    const uint64_t start = spec.block_offset(block), size = spec.block_bytes(block);
    if (start + size > bytes.size()) return;
    put(bytes, 4096 + 8 * block, crc32c(bytes.data() + start, size), 4);
    put(bytes, 4100 + 8 * block, 0x454E4F44, 4);
  }
}

// Where a change may tell: fields of the header, the table, anywhere.
size_t pick_place(const ViewSpec& spec, size_t size, Random& random) {
  size_t first = 0, length = size;
  switch (random.below(4)) {
    case 0: length = 80; break;
    case 1: first = 4088; length = 8 + 8 * spec.blocks(); break;
    case 2: first = spec.data_offset(); length = spec.file_bytes() - first; break;
    default: break;
  }
  return std::min(first + random.below(length), size - 1);
}

void mutate(const ViewSpec& spec, Bytes& bytes, Random& random) {
  static const uint64_t kEdges[] = {0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7F800000,
                                    0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
                                    4096, uint64_t{1} << 40, uint64_t{1} << 62, ~uint64_t{0}};
  for (uint64_t left = random.below(6); left > 0 && !bytes.empty(); --left) {
    const size_t place = pick_place(spec, bytes.size(), random);
    switch (random.below(7)) {
      case 0: bytes[place] ^= static_cast<unsigned char>(1u << random.below(8)); break;
      case 1: bytes[place] = static_cast<unsigned char>(random.next()); break;
      case 2: put(bytes, place & ~size_t{3}, kEdges[random.below(19)], 4); break;
      case 3: put(bytes, place & ~size_t{7}, kEdges[random.below(19)], 8); break;
      case 4: {
        const size_t length = std::min<size_t>(1 + random.below(64), bytes.size() - place);
        for (size_t i = 0; i < length; ++i) bytes[place + i] = static_cast<unsigned char>(random.next());
        break;
      }
      case 5: {
        const size_t from = random.below(bytes.size());
        const size_t length = std::min<size_t>(1 + random.below(512), bytes.size() - std::max(from, place));
        std::memmove(bytes.data() + place, bytes.data() + from, length);
        break;
      }
      default:
        if (random.below(4) == 0) bytes.resize(random.below(2) ? place : bytes.size() + random.below(9000));
    }
  }
}

// Whether the block is one that may be read, from the bytes and docs/cache-format.md.
bool is_whole(const ViewSpec& spec, const Bytes& bytes, uint64_t block) {
  const unsigned char* data = bytes.data() + spec.block_offset(block);
  uint32_t entry[2];
  std::memcpy(entry, bytes.data() + 4096 + 8 * block, 8);
  if (entry[1] != 0x454E4F44 || entry[0] != crc32c_table(data, spec.block_bytes(block))) return false;
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

// Returns whether all records came out. `header` is the only one that may be opened.
bool read_all(const std::string& path, const Bytes& bytes, const Bytes& header, const Shape& shape,
              Random& random) {
  const ViewSpec& spec = shape.spec;
  const auto view = std::make_shared<ViewReader>(path, spec);
  require(bytes.size() == spec.file_bytes(), "a file of another size was opened");
  require(std::equal(header.begin(), header.end(), bytes.begin()), "another header was taken");
  const std::vector<BlockState> states = view->table_states();
  std::vector<bool> good(spec.blocks());
  bool all = true;
  for (uint64_t block = 0; block < spec.blocks(); ++block) {
    std::string why;
    const BlockState state = view->check_block(block, &why);
    good[block] = state == BlockState::complete;
    all = all && good[block];
    require(good[block] == is_whole(spec, bytes, block), "whole or not");
    require(!good[block] || states[block] == BlockState::complete, "complete against the table");
    require((state == BlockState::broken) == !why.empty(), "a broken block says why");
  }
  Bytes raw(spec.num_records * spec.record_bytes);
  try {
    view->read(0, spec.num_records, raw.data());
    require(all, "read handed out a block that is not complete");
  } catch (const FormatError&) {
    require(!all, "read refused whole blocks");
  }
  ViewTable table;
  table.add(view);
  const size_t count = 1 + random.below(40);
  std::vector<int64_t> rows(count), ids(count, static_cast<int64_t>(spec.view_id));
  bool wanted = true;
  for (int64_t& row : rows) {
    row = static_cast<int64_t>(random.below(spec.num_records));
    wanted = wanted && good[view->block_of(static_cast<uint64_t>(row))];
  }
  Located located;
  require(table.locate(ids.data(), count, 1, &located) < 0, "an open view was not found");
  Answers answers(shape.layout, count);
  try {
    gather(located, rows.data(), count, shape.layout, answers.out);
    require(wanted, "gather handed out a block that is not complete");
    answers.require_ids_below(shape.layout.num_classes);
  } catch (const FormatError&) {
    require(!wanted, "gather refused whole blocks");
  }
  if (!all) return false;
  Answers straight(shape.layout, spec.num_records);
  require(decode_rows(shape.layout, raw.data(), static_cast<int64_t>(spec.num_records), nullptr,
                      static_cast<int64_t>(spec.num_records), straight.out) < 0,
          "rows in range were refused");
  straight.require_ids_below(shape.layout.num_classes);
  for (size_t i = 0; i < count && shape.layout.kind == RecordKind::topk; ++i) {
    const auto row = static_cast<size_t>(rows[i]) * shape.layout.k;
    require(std::memcmp(&answers.ids[i * shape.layout.k], &straight.ids[row], 4 * shape.layout.k) == 0,
            "gather and decode differ");
  }
  return true;
}

// A writer goes on with the file: afterwards its block is whole, or it refused the file at once.
void write_on(const std::string& path, const Shape& shape, Random& random) {
  ViewWriter writer(path, path, shape.spec);
  const uint64_t block = random.below(shape.spec.blocks());
  const Bytes records = make_records(shape, random, make_logits(shape, random));
  const uint64_t start = block * shape.spec.block_records * shape.spec.record_bytes;
  writer.commit(block, records.data() + start, shape.spec.block_bytes(block));
  std::string why;
  require(writer.check_block(block, &why) == BlockState::complete, "a committed block is not whole");
}

// Any bits as logits: a record that decodes, or the number of a row that is not finite.
void encode_bits(const Shape& shape, Random& random) {
  std::vector<float> logits(shape.spec.num_records * shape.layout.num_classes);
  const bool finite = random.below(2) == 0;
  int64_t expected = -1;
  for (size_t i = 0; i < logits.size(); ++i) {
    auto bits = static_cast<uint32_t>(random.next());
    if (finite && (bits & 0x7F800000u) == 0x7F800000u) bits ^= 0x00800000u;
    std::memcpy(&logits[i], &bits, 4);
    if ((bits & 0x7F800000u) == 0x7F800000u && expected < 0) {
      expected = static_cast<int64_t>(i / shape.layout.num_classes);
    }
  }
  const auto count = static_cast<int64_t>(shape.spec.num_records);
  Bytes records(static_cast<size_t>(count) * shape.layout.record_bytes);
  const std::vector<int64_t> labels(static_cast<size_t>(count));
  const int64_t bad = encode_topk(shape.topk, logits.data(), count,
                                  shape.topk.true_class ? labels.data() : nullptr, records.data());
  require(bad == expected, "the first row that is not finite");
  if (bad >= 0) return;
  Answers answers(shape.layout, static_cast<size_t>(count));
  decode_rows(shape.layout, records.data(), count, nullptr, count, answers.out);
  answers.require_ids_below(shape.layout.num_classes);
  for (const float value : answers.numbers) require(value <= 1e-5f, "a probability above one");
  for (const float value : answers.tails) require(value <= 0.0f, "a tail above one");
}

struct Outcome {
  uint64_t refused = 0, partly = 0, whole = 0, encoded = 0;
};

void run_one(MemoryFile& file, Outcome& outcome) {
  Random random{seed * 0x9E3779B97F4A7C15u + number};
  // 65,600 classes take a thousand times as long to encode as 40: seldom, and few.
  const uint64_t draw = random.below(16 * kKinds);
  const int kind = draw == 0 ? kWideKind : static_cast<int>(draw % kWideKind);
  const uint64_t most = kind == kWideKind ? 2 : 24;
  const Shape shape = make_shape(kind, 1 + random.below(most), 1 + static_cast<uint32_t>(random.below(most)));
  if (shape.layout.kind == RecordKind::topk && random.below(8) == 0) {
    encode_bits(shape, random);
    ++outcome.encoded;
    return;
  }
  Bytes bytes = valid_file(shape, random);
  repair_blocks(shape.spec, bytes);
  repair_header(bytes);
  const Bytes header(bytes.begin(), bytes.begin() + 4096);
  mutate(shape.spec, bytes, random);
  const uint64_t repairs = random.below(4);
  if (repairs >= 2) repair_header(bytes);
  if (repairs == 3) repair_blocks(shape.spec, bytes);
  file.fill(bytes);
  try {
    ++(read_all(file.path(), bytes, header, shape, random) ? outcome.whole : outcome.partly);
    if (random.below(4) == 0) write_on(file.path(), shape, random);
  } catch (const FormatError&) {
    ++outcome.refused;
  }  // anything else ends the run
}

}  // namespace

extern "C" const char* __asan_default_options() { return "handle_abort=1"; }  // say_which then too

int main(int count, char** words) {
  const double seconds = count > 1 ? std::atof(words[1]) : 10.0;
  if (count > 2) seed = std::strtoull(words[2], nullptr, 10);
  const bool single = count > 3;
  if (single) number = std::strtoull(words[3], nullptr, 10);
  __sanitizer_set_death_callback(say_which);
  MemoryFile file;
  Outcome outcome;
  uint64_t inputs = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  do {
    run_one(file, outcome);
    ++number;
    ++inputs;
  } while (!single && std::chrono::steady_clock::now() < end);
  const auto show = [](uint64_t value) { return static_cast<unsigned long long>(value); };
  std::printf("fuzz: %llu inputs of seed %llu: %llu refused, %llu read in part, %llu read whole, "
              "%llu encoded; no finding\n",
              show(inputs), show(seed), show(outcome.refused), show(outcome.partly),
              show(outcome.whole), show(outcome.encoded));
  return 0;
}
