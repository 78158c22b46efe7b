// Feeds mutated view files to all code of csrc/ that reads bytes it did not write: header, block
// table, checksums, class ids, the decoders of every codec, and a writer that resumes such a file.
// Half of the inputs get valid checksums again, or none would pass the header.
//
//   fuzz SECONDS [SEED [NUMBER]]        seconds of CPU time
//
// Build with -fsanitize=address,undefined. The same seed gives the same inputs; NUMBER runs one.
#include <sanitizer/common_interface_defs.h>

#include <ctime>

#include "views.h"

using namespace deit_fast;

namespace {

uint64_t seed = 1, number = 0;

void say_which() {
  std::fprintf(stderr, "at input %llu of seed %llu: fuzz 0 %llu %llu reproduces it\n",
               static_cast<unsigned long long>(number), static_cast<unsigned long long>(seed),
               static_cast<unsigned long long>(seed), static_cast<unsigned long long>(number));
}

// An offset where a change matters: a field of the header, the table, the records, or anywhere.
size_t pick_offset(const ViewSpec& spec, size_t size, Random& random) {
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
    const size_t offset = pick_offset(spec, bytes.size(), random);
    switch (random.below(8)) {
      case 0: bytes[offset] ^= static_cast<unsigned char>(1u << random.below(8)); break;
      case 1: bytes[offset] = static_cast<unsigned char>(random.next()); break;
      case 2: put(bytes, offset & ~size_t{3}, kEdges[random.below(19)], 4); break;
      case 3: put(bytes, offset & ~size_t{7}, kEdges[random.below(19)], 8); break;
      case 4: {
        const size_t length = std::min<size_t>(1 + random.below(64), bytes.size() - offset);
        for (size_t i = 0; i < length; ++i) bytes[offset + i] = static_cast<unsigned char>(random.next());
        break;
      }
      case 5: {
        const size_t from = random.below(bytes.size());
        const size_t length = std::min<size_t>(1 + random.below(512), bytes.size() - std::max(from, offset));
        std::memmove(bytes.data() + offset, bytes.data() + from, length);
        break;
      }
      case 6: {  // an id: the last class or one of the two numbers above it
        if (spec.ids_per_record == 0) break;
        const uint64_t id = random.below(spec.num_records * spec.ids_per_record);
        const uint64_t record = id / spec.ids_per_record, field = id % spec.ids_per_record;
        put(bytes, spec.data_offset() + record * spec.record_bytes + field * spec.id_bytes,
            spec.id_limit - 1 + random.below(3), spec.id_bytes);
        break;
      }
      default:
        if (random.below(4) == 0) bytes.resize(random.below(2) ? offset : bytes.size() + random.below(9000));
    }
  }
}

// Random bits as logits: either a record that decodes, or the index of a row that is not finite.
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
  const int64_t bad = encode_topk(shape.topk, logits.data(), count, records.data());
  require(bad == expected, "the first row that is not finite");
  if (bad >= 0) return;
  DecodedRecords decoded_records(shape.layout, static_cast<size_t>(count));
  decode_records(shape.layout, records.data(), static_cast<size_t>(count), decoded_records.out);
  decoded_records.require_ids_below(shape.layout.num_classes);
  for (const float value : decoded_records.numbers) require(value <= 1e-5f, "a probability above one");
  for (const float value : decoded_records.tails) require(value <= 0.0f, "a tail above one");
}

struct Counts {
  uint64_t refused = 0, partly = 0, whole = 0, encoded = 0;
};

void run_one(MemoryFile& file, Counts& counts) {
  Random random{seed * 0x9E3779B97F4A7C15u + number};
  // 65,600 classes take a thousand times as long to encode as 40: draw them rarely, and few records.
  const uint64_t draw = random.below(16 * kKinds);
  const int kind = draw == 0 ? kWideKind : static_cast<int>(draw % kWideKind);
  const uint64_t most = kind == kWideKind ? 2 : 24;
  const Shape shape = make_shape(kind, 1 + random.below(most), 1 + static_cast<uint32_t>(random.below(most)));
  if (shape.layout.kind == RecordKind::topk && random.below(8) == 0) {
    encode_bits(shape, random);
    ++counts.encoded;
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
    ++(read_all(file.path(), bytes, header, shape, random) ? counts.whole : counts.partly);
    if (random.below(4) == 0) write_on(file.path(), shape, random);
  } catch (const FormatError&) {
    ++counts.refused;
  }  // anything else ends the run
}

}  // namespace

extern "C" const char* __asan_default_options() { return "handle_abort=1"; }  // then say_which runs too

int main(int count, char** words) {
  const double seconds = count > 1 ? std::atof(words[1]) : 10.0;
  if (count > 2) seed = std::strtoull(words[2], nullptr, 10);
  const bool single = count > 3;
  if (single) number = std::strtoull(words[3], nullptr, 10);
  __sanitizer_set_death_callback(say_which);
  MemoryFile file;
  Counts counts;
  uint64_t inputs = 0;
  const auto cpu_seconds = [] { return double(std::clock()) / CLOCKS_PER_SEC; };
  do {
    run_one(file, counts);
    ++number;
    ++inputs;
  } while (!single && cpu_seconds() < seconds);
  const auto show = [](uint64_t value) { return static_cast<unsigned long long>(value); };
  std::printf("fuzz: %llu inputs of seed %llu: %llu refused, %llu read in part, %llu read whole, "
              "%llu encoded; no finding\n",
              show(inputs), show(seed), show(counts.refused), show(counts.partly),
              show(counts.whole), show(counts.encoded));
  return 0;
}
