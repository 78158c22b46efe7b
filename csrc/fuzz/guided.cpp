// The checks of fuzz.cpp under libFuzzer, which looks for inputs that reach new code and keeps them.
//
// An input is the first six bytes of `Choice`, then changes of a valid file: place (3 bytes, little
// endian), length, and so many bytes. Build with clang++ -fsanitize=fuzzer,address,undefined.
#include <map>
#include <utility>

#include "views.h"

using namespace deit_fast;

namespace {

struct Choice {
  uint8_t kind, records, block_records, seed, repairs, size;
};

// Kept, as encoding its records takes far longer than reading the file.
const std::pair<Shape, Bytes>& valid(const Choice& choice) {
  static std::map<uint32_t, std::pair<Shape, Bytes>> known;
  const int kind = choice.kind == 0 ? kWideKind : choice.kind % kWideKind;
  const unsigned most = kind == kWideKind ? 2 : 24;
  const unsigned records = 1 + choice.records % most, block_records = 1 + choice.block_records % most;
  const uint32_t key = static_cast<uint32_t>(kind) << 16 | records << 8 | block_records;
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  if (known.size() >= 1000) known.clear();
  const Shape shape = make_shape(kind, records, block_records);
  Random random{key};
  Bytes bytes = valid_file(shape, random);
  repair_blocks(shape.spec, bytes);
  repair_header(bytes);
  return known.emplace(key, std::make_pair(shape, std::move(bytes))).first->second;
}

void change(Bytes& bytes, const uint8_t* data, size_t left) {
  while (left > 4 && !bytes.empty()) {
    const size_t place = (data[0] | size_t{data[1]} << 8 | size_t{data[2]} << 16) % bytes.size();
    const size_t length = std::min<size_t>({data[3], left - 4, bytes.size() - place});
    std::memcpy(bytes.data() + place, data + 4, length);
    data += 4 + length;
    left -= 4 + length;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Choice choice;
  if (size < sizeof choice) return 0;
  std::memcpy(&choice, data, sizeof choice);
  const auto& [shape, whole] = valid(choice);
  Random random{choice.seed};
  Bytes bytes = whole;
  const Bytes header(bytes.begin(), bytes.begin() + 4096);
  change(bytes, data + sizeof choice, size - sizeof choice);
  if (choice.repairs & 1) repair_header(bytes);
  if (choice.repairs & 2) repair_blocks(shape.spec, bytes);
  if (choice.repairs & 4) bytes.resize(bytes.size() * choice.size / 128);
  static MemoryFile file;
  file.fill(bytes);
  try {
    read_all(file.path(), bytes, header, shape, random);
    if (choice.repairs & 8) write_on(file.path(), shape, random);
  } catch (const FormatError&) {
  }  // anything else is a finding
  return 0;
}
