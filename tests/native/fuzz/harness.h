// Shared by the fuzzer, the sanitized operations and the emulator: codecs by number, records, and
// decoding into buffers of the exact size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../../csrc/crc32c.h"
#include "../../../csrc/logit_cache.h"
#include "../../../csrc/record_codec.h"
#include "../../../csrc/view_table.h"
#include "random.h"

namespace deit_fast {

// Reports a finding; the fuzzer adds the number of the input, which reproduces it.
[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "finding: %s\n", what.c_str());
  std::abort();
}
inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

// A codec and the shape of a view, small enough for thousands of files a second.
struct Shape {
  RecordLayout layout;
  TopKShape topk{};
  ViewSpec spec;
};

constexpr int kKinds = 9, kWideKind = 8;
constexpr double kInverseTemperatures[2] = {1.0, 0.5};

inline Shape make_shape(int kind, uint64_t records, uint32_t block_records) {
  Shape shape;
  RecordLayout& layout = shape.layout;
  const auto topk = [&](uint32_t classes, uint32_t k) {
    layout.kind = RecordKind::topk;
    layout.num_classes = classes;
    layout.k = k;
    layout.id_bytes = classes > 65536 ? 4 : 2;
    shape.topk = {classes, k, layout.id_bytes, 2, kInverseTemperatures};
    layout.record_bytes = shape.topk.record_bytes();
    layout.tail_offset = shape.topk.tail_offset() + 8;
    layout.tau = 2.0f;
  };
  switch (kind) {
    case 0: topk(40, 16); break;      // the path with F16C
    case 1: topk(37, 7); break;       // odd sizes
    case kWideKind: topk(65600, 5); break;  // four-byte ids
    case 2:
      layout.kind = RecordKind::hard;
      layout.num_classes = 30;
      layout.record_bytes = 2;
      break;
    case 3:
    case 4:
      layout.kind = kind == 3 ? RecordKind::int8 : RecordKind::fp8;
      layout.num_classes = 33;
      layout.record_bytes = 8 + 33;
      break;
    case 6:
    case 7:
      layout.kind = kind == 6 ? RecordKind::token_int8 : RecordKind::token_fp8;
      layout.tokens = 3;
      layout.num_classes = 17;
      layout.record_bytes = 3 * (4 + 17);
      break;
    default:
      layout.kind = RecordKind::copy;
      layout.num_classes = 9;
      layout.record_bytes = 18;
  }
  ViewSpec& spec = shape.spec;
  spec.num_records = records;
  spec.record_bytes = layout.record_bytes;
  spec.block_records = block_records;
  spec.view_id = 3;
  spec.version = 2 + static_cast<uint32_t>(records + block_records) % 2;
  spec.ids_per_record = layout.kind == RecordKind::topk ? layout.k : layout.kind == RecordKind::hard;
  spec.id_bytes = layout.id_bytes;
  spec.id_limit = layout.num_classes;
  for (size_t i = 0; i < 32; ++i) spec.manifest_sha256[i] = static_cast<unsigned char>(i * 7);
  return shape;
}

// Records as the cache's writers make them; top-k records from `logits` [records, num_classes].
inline std::vector<unsigned char> make_records(const Shape& shape, Random& random,
                                               const std::vector<float>& logits) {
  const RecordLayout& layout = shape.layout;
  const size_t count = shape.spec.num_records;
  std::vector<unsigned char> records(count * layout.record_bytes);
  if (layout.kind == RecordKind::topk) {
    const int64_t bad =
        encode_topk(shape.topk, logits.data(), static_cast<int64_t>(count), records.data());
    require(bad < 0, "finite logits were refused");
    return records;
  }
  for (unsigned char& byte : records) byte = static_cast<unsigned char>(random.next());
  if (layout.kind == RecordKind::hard) {
    for (size_t i = 0; i < count; ++i) {
      records[2 * i] = static_cast<unsigned char>(random.below(layout.num_classes));
      records[2 * i + 1] = 0;
    }
  }
  return records;
}

inline std::vector<float> make_logits(const Shape& shape, Random& random) {
  std::vector<float> logits(shape.spec.num_records * shape.layout.num_classes);
  for (float& value : logits) value = static_cast<float>(random.below(4001)) / 100.0f - 20.0f;
  return logits;
}

// Decoded records in buffers of the exact size, so that a sanitizer sees an access beyond them.
struct DecodedRecords {
  std::vector<unsigned char> bytes;
  std::vector<int64_t> labels;
  std::vector<int32_t> ids;
  std::vector<float> numbers, tails;
  Decoded out;

  DecodedRecords(const RecordLayout& layout, size_t count) {
    switch (layout.kind) {
      case RecordKind::copy:
        bytes.resize(count * layout.record_bytes);
        out.first = bytes.data();
        break;
      case RecordKind::hard:
        labels.resize(count);
        out.first = labels.data();
        break;
      case RecordKind::topk:
        ids.resize(count * layout.k);
        numbers.resize(count * layout.k);
        tails.resize(count);
        out = {ids.data(), numbers.data(), tails.data()};
        break;
      case RecordKind::int8:
      case RecordKind::fp8:
      case RecordKind::token_int8:
      case RecordKind::token_fp8:
        numbers.resize(count * layout.tokens * layout.num_classes);
        out.first = numbers.data();
    }
  }
  // Fills the buffers with unusual bits, so that values that are never written show.
  void mark() {
    std::fill(bytes.begin(), bytes.end(), static_cast<unsigned char>(0xA5));
    std::fill(labels.begin(), labels.end(), -7);
    std::fill(ids.begin(), ids.end(), -7);
    std::fill(numbers.begin(), numbers.end(), -7e7f);
    std::fill(tails.begin(), tails.end(), -7e7f);
  }
  void require_ids_below(uint32_t limit) const {
    for (const int32_t id : ids) require(id >= 0 && static_cast<uint32_t>(id) < limit, "an id out of range");
    for (const int64_t id : labels) require(id >= 0 && id < int64_t{limit}, "a label out of range");
  }
};

}  // namespace deit_fast
