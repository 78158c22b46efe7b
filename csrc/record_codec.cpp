#include "record_codec.h"

#include <algorithm>
#include <functional>
#include <vector>

// Compiles a second version of the loops for AVX2; the loader selects one. Both give the same bits.
#if defined(__x86_64__) && defined(__linux__)
#define DF_WIDE __attribute__((target_clones("avx2", "default")))
#define DF_F16C 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define DF_WIDE
#endif

namespace deit_fast {
namespace {

struct TopKOut {
  int32_t* ids;
  float* log_probs;
  float* log_tails;
};

template <typename T>
HOST_DEVICE T load(const unsigned char* address) {
  T value;
  memcpy(&value, address, sizeof value);
  return value;
}

// Runs the threads of a block one after another; a sum is one loop, which vectorises.
struct SerialBlock {
  template <typename Body>
  HOST_DEVICE void each(Body body) {
    for (uint32_t thread = 0; thread < kEncodeThreads; ++thread) body(thread);
  }
  template <typename Body>
  HOST_DEVICE bool any(Body body) {
    bool found = false;
    for (uint32_t thread = 0; thread < kEncodeThreads; ++thread) found |= body(thread);
    return found;
  }
  template <typename Term>
  HOST_DEVICE uint64_t total(uint32_t count, Term term) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < count; ++i) sum += term(i);
    return sum;
  }
  HOST_DEVICE uint32_t add(uint32_t* counter, uint32_t amount) {
    const uint32_t before = *counter;
    *counter = before + amount;
    return before;
  }
  void sort_descending(uint64_t* keys, uint32_t count, uint64_t* sorted, uint32_t kept) {
    std::partial_sort(keys, keys + kept, keys + count, std::greater<uint64_t>());
    std::copy(keys, keys + kept, sorted);
  }
};

DF_WIDE bool encode_row(const TopKShape& shape, const float* row, uint32_t room,
                        EncodeShared& shared, unsigned char* record) {
  SerialBlock block;
  return encode_topk_row(
      block, shape, [row](uint32_t i) { return row[i]; }, room, shared, record);
}

// Entry i of a record is stored[i] / T - shift. The product with 1 / T has one rounding more than
// the quotient, and keeps a division out of the loop.
template <typename Id>
HOST_DEVICE void decode_topk_record(const unsigned char* record, uint32_t k, float inverse,
                                    float shift,
                                int32_t* __restrict__ ids, float* __restrict__ log_probs) {
  const unsigned char* halves = record + k * sizeof(Id);
  for (uint32_t i = 0; i < k; ++i) ids[i] = static_cast<int32_t>(load<Id>(record + i * sizeof(Id)));
  for (uint32_t i = 0; i < k; ++i) {
    log_probs[i] = half_value(load<uint16_t>(halves + 2 * i)) * inverse - shift;
  }
}

template <typename Id>
HOST_DEVICE void decode_topk(const RecordLayout& layout, const unsigned char* const* records,
                         size_t count, const TopKOut& to) {
  const uint32_t k = layout.k;
  const float inverse = 1.0f / layout.tau;
  for (size_t i = 0; i < count; ++i) {
    const unsigned char* tail = records[i] + layout.tail_offset;
    to.log_tails[i] = load<float>(tail);
    decode_topk_record<Id>(records[i], k, inverse, load<float>(tail + 4), to.ids + k * i,
                           to.log_probs + k * i);
  }
}

DF_WIDE void decode_topk_any(const RecordLayout& layout, const unsigned char* const* records,
                             size_t count, const TopKOut& to) {
  if (layout.id_bytes == 2) {
    decode_topk<uint16_t>(layout, records, count, to);
  } else {
    decode_topk<uint32_t>(layout, records, count, to);
  }
}

#if defined(DF_F16C)
// The most common record, k = 16 with two-byte ids, decoded by F16C instructions. The bits are
// those of the general loop, since both conversions are exact.
__attribute__((target("avx2,f16c"))) void decode_topk16(const RecordLayout& layout,
                                                        const unsigned char* const* records,
                                                        size_t count, const TopKOut& to) {
  const __m256 inverse = _mm256_set1_ps(1.0f / layout.tau);
  for (size_t i = 0; i < count; ++i) {
    const auto* words = reinterpret_cast<const __m128i*>(records[i]);
    const unsigned char* tail = records[i] + layout.tail_offset;
    const __m256 shift = _mm256_set1_ps(load<float>(tail + 4));
    to.log_tails[i] = load<float>(tail);
    for (int half = 0; half < 2; ++half) {
      const size_t offset = 16 * i + 8 * half;
      const __m256i ids = _mm256_cvtepu16_epi32(_mm_loadu_si128(words + half));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.ids + offset), ids);
      const __m256 stored = _mm256_cvtph_ps(_mm_loadu_si128(words + 2 + half));
      _mm256_storeu_ps(to.log_probs + offset, _mm256_sub_ps(_mm256_mul_ps(stored, inverse), shift));
    }
  }
}

bool has_f16c() {  // not every compiler's __builtin_cpu_supports knows f16c
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

using DecodeTopK = void (*)(const RecordLayout&, const unsigned char* const*, size_t,
                            const TopKOut&);

DecodeTopK choose_topk(const RecordLayout& layout) {
#if defined(DF_F16C)
  static const bool fast = __builtin_cpu_supports("avx2") && has_f16c();
  if (fast && layout.k == 16 && layout.id_bytes == 2) return decode_topk16;
#endif
  (void)layout;
  return decode_topk_any;
}

DF_WIDE void decode_int8(const unsigned char* from, uint32_t classes, float* to) {
  const float low = load<float>(from), step = load<float>(from + 4);
  for (uint32_t i = 0; i < classes; ++i) to[i] = low + static_cast<float>(from[8 + i]) * step;
}

DF_WIDE void decode_fp8(const unsigned char* from, uint32_t classes, float* to) {
  const float top = load<float>(from), scale = load<float>(from + 4);
  for (uint32_t i = 0; i < classes; ++i) to[i] = top + fp8_value(from[8 + i]) * scale;
}

DF_WIDE void decode_token_int8(const unsigned char* from, uint32_t tokens, uint32_t channels,
                               float* to) {
  for (; tokens > 0; --tokens, from += 4 + channels, to += channels) {
    const float scale = load<float>(from);
    for (uint32_t i = 0; i < channels; ++i) {
      to[i] = static_cast<float>(static_cast<int8_t>(from[4 + i])) * scale;
    }
  }
}

DF_WIDE void decode_token_fp8(const unsigned char* from, uint32_t tokens, uint32_t channels,
                              float* to) {
  for (; tokens > 0; --tokens, from += 4 + channels, to += channels) {
    const float scale = load<float>(from);
    for (uint32_t i = 0; i < channels; ++i) to[i] = fp8_value(from[4 + i]) * scale;
  }
}

}  // namespace

void decode_batch(const RecordLayout& layout, const unsigned char* const* records, size_t count,
                  const Decoded& out, size_t begin) {
  switch (layout.kind) {
    case RecordKind::copy: {
      auto* to = static_cast<unsigned char*>(out.first) + begin * layout.record_bytes;
      for (size_t i = 0; i < count; ++i, to += layout.record_bytes) {
        memcpy(to, records[i], layout.record_bytes);
      }
      return;
    }
    case RecordKind::hard: {
      auto* to = static_cast<int64_t*>(out.first) + begin;
      for (size_t i = 0; i < count; ++i) {
        to[i] = layout.id_bytes == 2 ? load<uint16_t>(records[i]) : load<uint32_t>(records[i]);
      }
      return;
    }
    case RecordKind::topk: {
      choose_topk(layout)(layout, records, count,
                          {static_cast<int32_t*>(out.first) + begin * layout.k,
                           out.second + begin * layout.k, out.third + begin});
      return;
    }
    case RecordKind::int8:
    case RecordKind::fp8: {
      auto* to = static_cast<float*>(out.first) + begin * layout.num_classes;
      const auto decode = layout.kind == RecordKind::int8 ? decode_int8 : decode_fp8;
      for (size_t i = 0; i < count; ++i, to += layout.num_classes) {
        decode(records[i], layout.num_classes, to);
      }
      return;
    }
    case RecordKind::token_int8:
    case RecordKind::token_fp8: {
      const size_t values = size_t{layout.tokens} * layout.num_classes;
      auto* to = static_cast<float*>(out.first) + begin * values;
      const auto decode =
          layout.kind == RecordKind::token_int8 ? decode_token_int8 : decode_token_fp8;
      for (size_t i = 0; i < count; ++i, to += values) {
        decode(records[i], layout.tokens, layout.num_classes, to);
      }
    }
  }
}

void decode_records(const RecordLayout& layout, const unsigned char* records, size_t count,
                    const Decoded& out) {
  const unsigned char* batch[kDecodeBatch];
  for (size_t begin = 0; begin < count; begin += kDecodeBatch) {
    const size_t size = std::min(kDecodeBatch, count - begin);
    for (size_t i = 0; i < size; ++i) batch[i] = records + (begin + i) * layout.record_bytes;
    decode_batch(layout, batch, size, out, begin);
  }
}

int64_t encode_topk(const TopKShape& shape, const float* logits, int64_t count,
                    unsigned char* records) {
  const uint32_t room = std::max(kEncodeKeys, shape.k + 1);
  std::vector<uint64_t> keys(size_t{2} * room);
  EncodeShared shared{};
  shared.keys = keys.data();
  shared.sorted = keys.data() + room;
  for (int64_t i = 0; i < count; ++i) {
    const float* row = logits + i * shape.num_classes;
    if (!encode_row(shape, row, room, shared, records + i * shape.record_bytes())) return i;
  }
  return -1;
}

}  // namespace deit_fast
