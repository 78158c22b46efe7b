// Compares the kernels of csrc/cuda, run by the emulator, with the host's code byte for byte: every
// kind of record, sizes and alignments that take different paths, rows that are hard to select from.
//
//   emulate SECONDS [SEED]    rounds of all cases, at least one, each with other values and schedules
//   emulate defect NAME       a kernel with that defect, which must be reported; see defects.cu
//
// `make emulate` builds it with AddressSanitizer and UndefinedBehaviorSanitizer, and once more with
// ThreadSanitizer.
#include <chrono>
#include <cmath>
#include <cstring>

#include "../../../csrc/record_codec.h"
#include "../fuzz/harness.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

using namespace deit_fast;

void run_defect(const std::string& name);  // defects.cu

namespace {

// Divisor of the number of cases and records: ThreadSanitizer takes ten times as long.
constexpr uint64_t kShare = DF_PROCESSORS == 1 ? 1 : 3;

uint64_t encoded = 0, refused = 0, decoded = 0, launches = 0;

// `size` bytes that begin `askew` bytes after a 16-byte boundary and end at the end of the allocation.
class Buffer {
 public:
  Buffer(size_t size, size_t askew, Random& random) : bytes_(askew + size), askew_(askew) {
    for (unsigned char& byte : bytes_) byte = static_cast<unsigned char>(random.next());
  }
  unsigned char* data() { return bytes_.data() + askew_; }

 private:
  std::vector<unsigned char> bytes_;
  size_t askew_;
};

// Another schedule and, in half of the cases, a grid so small that blocks take several rows.
void shuffle_threads(Random& random) {
  emulator::settings.seed = random.next();
  emulator::settings.max_blocks = random.below(2) ? 1u << 16 : 1 + static_cast<unsigned>(random.below(3));
  ++launches;
}

float normal(Random& random) {
  float sum = -6;
  for (int i = 0; i < 12; ++i) sum += static_cast<float>(random.next() >> 40) * 0x1p-24f;
  return sum;
}

constexpr int kPatterns = 9;
float logit(int pattern, uint32_t i, const TopKShape& shape, Random& random) {
  switch (pattern) {
    case 0: return normal(random) * 1e-3f;
    case 1: return normal(random) * 5000;
    case 2: return static_cast<float>(i);
    case 3: return -static_cast<float>(i);
    case 4: return i == shape.num_classes / 2 ? 40.0f : -40.0f;
    case 5: return static_cast<float>(random.below(3)) * (random.below(2) ? 1.0f : -1.0f);
    case 6: return normal(random) + (i % kEncodeThreads < shape.k ? 50.0f : 0.0f);  // few threads' share
    case 7: return -0.0f;
    default: return normal(random);
  }
}

float round_to(FloatType type, float value, unsigned char* to) {
  const auto bits = bits_as<uint32_t>(value);
  if (type == FloatType::float32) {
    std::memcpy(to, &value, 4);
    return value;
  }
  const bool brain = type == FloatType::bfloat16;
  const bool special = !std::isfinite(value);
  const auto half = brain     ? static_cast<uint16_t>(bits >> 16)
                    : special ? static_cast<uint16_t>(std::isnan(value) ? 0x7E00 : 0xFC00)
                              : half_bits(value);
  std::memcpy(to, &half, 2);
  return brain ? __bfloat162float({half}) : special ? value : half_value(half);
}

void encode(FloatType type, TopKShape shape, int64_t rows, bool staged, Random& random) {
  const size_t size = type == FloatType::float32 ? 4 : 2, classes = shape.num_classes;
  const size_t count = static_cast<size_t>(rows), bytes = shape.record_bytes();
  Buffer logits(count * classes * size, size * random.below(16 / size), random);
  std::vector<float> widened(count * classes);
  std::vector<bool> bad(count);
  int64_t expected = rows;
  for (size_t row = 0; row < count; ++row) {
    const int pattern = static_cast<int>(random.below(kPatterns));
    bad[row] = random.below(8) == 0;
    const uint64_t first = bad[row] ? random.below(classes) : classes, step = 1 + random.below(classes);
    if (bad[row]) expected = std::min(expected, static_cast<int64_t>(row));
    for (uint32_t i = 0; i < classes; ++i) {
      float value = logit(pattern, i, shape, random);
      if (i >= first && (i - first) % step == 0) value = random.below(2) ? -INFINITY : NAN;
      widened[row * classes + i] = round_to(type, value, logits.data() + (row * classes + i) * size);
    }
  }
  Buffer records(count * bytes, 2 * random.below(8), random);
  std::vector<unsigned char> host(records.data(), records.data() + count * bytes);
  for (size_t row = 0; row < count; ++row) {
    const int64_t found = encode_topk(shape, &widened[row * classes], 1, &host[row * bytes]);
    require((found == 0) == bad[row], "a row that is finite or not");
    ++(bad[row] ? refused : encoded);
  }
  shuffle_threads(random);
  emulator::settings.shared_limit = staged ? 232448 : 1024;
  int64_t first_bad = rows;
  cuda_encode_topk(shape, logits.data(), type, rows, records.data(), &first_bad, 0, nullptr);
  require(first_bad == expected, "the first row that is not finite");
  require(std::memcmp(records.data(), host.data(), host.size()) == 0, "encoded records");
}

void encode_all(Random& random) {
  const double inverse[] = {1.0, 1 / 3.0, 2.0, 0.5, 1.0, 0.1, 0.25, 4.0};
  for (const FloatType type : {FloatType::float32, FloatType::bfloat16, FloatType::float16}) {
    for (const uint32_t classes : {1u, 2u, 10u, 129u, 1000u, 1023u, 1025u, 21841u}) {
      for (const uint32_t k : {1u, 16u, 127u, 128u, 200u, 1023u, classes}) {
        // The widest rows cost as much as all others: about one case for each type.
        if (k > classes || k >= kEncodeKeys || (classes > 2000 && random.below(6) != 0)) continue;
        if (random.below(kShare) != 0) continue;
        const auto temperatures = static_cast<uint32_t>(1 + random.below(random.below(4) ? 2 : 8));
        const uint32_t id_bytes = random.below(2) ? 2 : 4;
        const TopKShape shape{classes, k, id_bytes, temperatures, inverse};
        const int64_t rows = classes > 2000 ? 2 : 1 + static_cast<int64_t>(random.below(5));
        encode(type, shape, rows, random.below(2) == 0, random);
      }
    }
  }
  try {
    cuda_encode_topk({2000, kEncodeKeys, 2, 1, inverse}, nullptr, FloatType::float32, 1, nullptr,
                     nullptr, 0, nullptr);
    fail("a larger k than there is room for was taken");
  } catch (const std::runtime_error&) {
    ++refused;
  }
}

// Bit for bit, except that any NaN equals any other.
void require_equal(const std::vector<float>& a, const std::vector<float>& b, const char* what) {
  for (size_t i = 0; i < a.size(); ++i) {
    require((std::isnan(a[i]) && std::isnan(b[i])) || std::memcmp(&a[i], &b[i], 4) == 0, what);
  }
}

void decode(RecordLayout layout, size_t askew, Random& random) {
  if (random.below(kShare) != 0) return;
  const size_t bytes = layout.record_bytes;
  const size_t most = bytes > 100 ? 60 : layout.kind == RecordKind::topk ? 300 : 3000;
  const size_t count = 1 + random.below(most / kShare);
  Buffer table(count * bytes, askew, random);
  if (layout.kind == RecordKind::topk) {  // finite float16, as in every record
    for (size_t i = 0; i < count * layout.k; ++i) {
      unsigned char* halves = table.data() + i / layout.k * bytes + layout.k * layout.id_bytes;
      unsigned char& high = halves[i % layout.k * 2 + 1];
      if ((high & 0x7C) == 0x7C) high &= 0xBF;
    }
  }
  DecodedRecords host(layout, count), device(layout, count);
  device.mark();
  // Kernels that choose their words by the output's address also get an unaligned output.
  const bool chooses = layout.kind != RecordKind::topk;
  const size_t size = 4 * device.numbers.size();
  Buffer skewed(size, 4 * random.below(random.below(2) ? 4 : 1), random);
  if (chooses) device.out.first = skewed.data();
  decode_records(layout, table.data(), count, host.out);
  shuffle_threads(random);
  cuda_decode_records(layout, table.data(), static_cast<int64_t>(count), device.out, 0, nullptr);
  if (chooses) std::memcpy(device.numbers.data(), skewed.data(), size);
  require(device.ids == host.ids, "decoded ids");
  require_equal(device.numbers, host.numbers, "decoded numbers");
  require_equal(device.tails, host.tails, "decoded tails");
  decoded += count;
}

void decode_all(Random& random) {
  for (const uint32_t id_bytes : {2u, 4u}) {
    for (const uint32_t k : {1u, 7u, 15u, 16u, 17u, 33u, 130u}) {
      const uint32_t probs = k * (id_bytes + 2), temperatures = 1 + static_cast<uint32_t>(random.below(2));
      const uint32_t record_bytes = probs + 8 * temperatures + 4 * static_cast<uint32_t>(random.below(2));
      const float tau = random.below(2) ? 3.0f : 1.0f;
      decode({RecordKind::topk, record_bytes, 70000, id_bytes, k, probs + 8 * (temperatures - 1), tau},
             2 * random.below(3), random);
    }
  }
  for (const RecordKind kind : {RecordKind::int8, RecordKind::fp8}) {
    for (const uint32_t classes : {1u, 3u, 4u, 33u, 256u, 1000u, 1001u, 1028u}) {
      decode({kind, classes + 8, classes}, 0, random);
      decode({kind, classes + 8, classes}, 1 + random.below(15), random);
    }
  }
  for (const RecordKind kind : {RecordKind::token_int8, RecordKind::token_fp8}) {
    for (const uint32_t channels : {1u, 3u, 4u, 36u, 127u, 384u}) {
      for (const uint32_t tokens : {1u, 5u, 16u}) {
        const RecordLayout layout{kind, tokens * (channels + 4), channels, 2, 0, 0, 1.0f, tokens};
        decode(layout, 0, random);
        decode(layout, 1 + random.below(15), random);
      }
    }
  }
}

}  // namespace

extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }

int main(int count, char** words) {
  if (count == 3 && std::string(words[1]) == "defect") {
    run_defect(words[2]);
    std::printf("the defect got through\n");
    return 0;
  }
  const double seconds = count > 1 ? std::atof(words[1]) : 0;
  uint64_t seed = count > 2 ? std::strtoull(words[2], nullptr, 10) : 1;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  uint64_t rounds = 0;
  do {
    Random random{seed * 0x9E3779B97F4A7C15u};
    encode_all(random);
    decode_all(random);
    ++seed, ++rounds;
  } while (std::chrono::steady_clock::now() < end);
  const auto show = [](uint64_t value) { return static_cast<unsigned long long>(value); };
  std::printf("emulate: %llu rounds, %llu launches: %llu records encoded, %llu decoded, %llu refused; "
              "no finding\n",
              show(rounds), show(launches), show(encoded), show(decoded), show(refused));
  return 0;
}
