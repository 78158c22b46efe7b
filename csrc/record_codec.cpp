#include "record_codec.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

// A second version of the loops for the wider vector units that most x86 CPUs have, chosen when the
// library is loaded. Both give the same bits.
#if defined(__x86_64__) && defined(__linux__)
#define DF_WIDE __attribute__((target_clones("avx2", "default")))
#else
#define DF_WIDE
#endif

namespace deit_fast {
namespace {

template <typename T>
DF_BOTH T load(const unsigned char* place) {
  T value;
  memcpy(&value, place, sizeof value);
  return value;
}

// The threads of a block one after another; a sum in one loop, which vectorises.
struct SerialBlock {
  template <typename Body>
  DF_BOTH void each(Body body) {
    for (uint32_t thread = 0; thread < kEncodeThreads; ++thread) body(thread);
  }
  template <typename Term>
  DF_BOTH uint64_t total(uint32_t count, Term term) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < count; ++i) sum += term(i);
    return sum;
  }
  DF_BOTH uint32_t add(uint32_t* counter, uint32_t amount) {
    const uint32_t before = *counter;
    *counter = before + amount;
    return before;
  }
  void sort_descending(uint64_t* keys, uint32_t count, uint64_t* sorted, uint32_t wanted) {
    std::partial_sort(keys, keys + wanted, keys + count, std::greater<uint64_t>());
    std::copy(keys, keys + wanted, sorted);
  }
};

DF_WIDE bool encode_row(const TopKShape& shape, const float* row, uint32_t label, uint32_t room,
                        EncodeShared& shared, unsigned char* record) {
  SerialBlock block;
  return encode_topk_row(
      block, shape, [row](uint32_t i) { return row[i]; }, label, room, shared, record);
}

// Sum of 32 numbers by halves, as a warp's lanes do it.
DF_BOTH float sum_by_halves(float* lanes) {
  for (uint32_t half = 16; half > 0; half /= 2) {
    for (uint32_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Sums of `count` rows of 2 * Half numbers, once by halves: row by row, so that no addition waits
// for the one before.
template <uint32_t Half>
DF_BOTH void halve(const float* from, size_t count, float* to) {
  for (size_t row = 0; row < count; ++row) {
    for (uint32_t i = 0; i < Half; ++i) {
      to[row * Half + i] = from[row * 2 * Half + i] + from[row * 2 * Half + Half + i];
    }
  }
}

// to[row][i] = from[row][i] - less[row] for rows of 16, in the compiler's vectors: left to itself it
// strides over the rows.
DF_BOTH void subtract_rows(const float* from, const float* less, size_t count, float* to) {
  typedef float Eight __attribute__((vector_size(32)));
  for (size_t row = 0; row < count; ++row) {
    Eight low, high;
    memcpy(&low, from + 16 * row, 32);
    memcpy(&high, from + 16 * row + 8, 32);
    low -= less[row];
    high -= less[row];
    memcpy(to + 16 * row, &low, 32);
    memcpy(to + 16 * row + 8, &high, 32);
  }
}

// The usual record, k = 16 and two-byte ids, in loops that vectorise; the operations are those of
// decode_topk_record.
DF_BOTH void decode_sixteens(const unsigned char* const* records, size_t count, float tau,
                             int32_t* __restrict__ ids, float* __restrict__ log_probs,
                             float* __restrict__ firsts, float* __restrict__ sums) {
  constexpr size_t kNumbers = 16 * kHandful;
  uint16_t stored_ids[kNumbers], stored[kNumbers];
  alignas(64) float terms[kNumbers], eights[kNumbers / 2], fours[kNumbers / 4], twos[kNumbers / 8];
  for (size_t i = 0; i < count; ++i) {
    memcpy(stored_ids + 16 * i, records[i], 32);
    memcpy(stored + 16 * i, records[i] + 32, 32);
  }
  for (size_t i = 0; i < 16 * count; ++i) ids[i] = stored_ids[i];
  int exponent = 0;
  if (std::frexp(tau, &exponent) == 0.5f) {  // a power of two: the product is the quotient
    const float inverse = 1.0f / tau;
    for (size_t i = 0; i < 16 * count; ++i) log_probs[i] = half_value(stored[i]) * inverse;
  } else {
    for (size_t i = 0; i < 16 * count; ++i) log_probs[i] = half_value(stored[i]) / tau;
  }
  for (size_t row = 0; row < count; ++row) firsts[row] = log_probs[16 * row];
  subtract_rows(log_probs, firsts, count, terms);
  for (size_t i = 0; i < 16 * count; ++i) terms[i] = exp_of(terms[i]);
  halve<8>(terms, count, eights);
  halve<4>(eights, count, fours);
  halve<2>(fours, count, twos);
  halve<1>(twos, count, sums);
}

template <typename Id>
DF_BOTH float decode_topk_record(const unsigned char* record, uint32_t k, float tau, int32_t* ids,
                                 float* log_probs) {
  const unsigned char* halves = record + k * sizeof(Id);
  float lanes[32] = {};
  for (uint32_t i = 0; i < k; ++i) {
    ids[i] = static_cast<int32_t>(load<Id>(record + i * sizeof(Id)));
    log_probs[i] = half_value(load<uint16_t>(halves + 2 * i)) / tau;
    lanes[i % 32] += exp_of(log_probs[i] - log_probs[0]);
  }
  return sum_by_halves(lanes);
}

template <bool Sixteen, typename Id>
DF_BOTH void decode_topk(const RecordLayout& layout, const unsigned char* const* records,
                         size_t count, int32_t* ids, float* __restrict__ log_probs,
                         float* log_tails) {
  const uint32_t k = Sixteen ? 16 : layout.k;
  float firsts[kHandful], sums[kHandful], shifts[kHandful];
  for (size_t i = 0; i < count; ++i) log_tails[i] = load<float>(records[i] + layout.tail_offset);
  if (Sixteen) {
    decode_sixteens(records, count, layout.tau, ids, log_probs, firsts, sums);
  } else {
    for (size_t i = 0; i < count; ++i) {
      sums[i] = decode_topk_record<Id>(records[i], k, layout.tau, ids + k * i, log_probs + k * i);
      firsts[i] = log_probs[k * i];
    }
  }
  for (size_t i = 0; i < count; ++i) {
    shifts[i] = firsts[i] + (log_of(sums[i]) - log_one_minus_exp(log_tails[i]));
  }
  if (Sixteen) return subtract_rows(log_probs, shifts, count, log_probs);
  for (size_t record = 0; record < count; ++record) {
    for (uint32_t i = 0; i < k; ++i) log_probs[record * k + i] -= shifts[record];
  }
}

DF_WIDE void decode_topk16(const RecordLayout& layout, const unsigned char* const* records,
                           size_t count, int32_t* ids, float* log_probs, float* log_tails) {
  decode_topk<true, uint16_t>(layout, records, count, ids, log_probs, log_tails);
}

DF_WIDE void decode_topk_any(const RecordLayout& layout, const unsigned char* const* records,
                             size_t count, int32_t* ids, float* log_probs, float* log_tails) {
  if (layout.id_bytes == 2) {
    decode_topk<false, uint16_t>(layout, records, count, ids, log_probs, log_tails);
  } else {
    decode_topk<false, uint32_t>(layout, records, count, ids, log_probs, log_tails);
  }
}

DF_WIDE void decode_int8(const unsigned char* from, uint32_t classes, float* to) {
  const float low = load<float>(from), step = load<float>(from + 4);
  for (uint32_t i = 0; i < classes; ++i) to[i] = low + static_cast<float>(from[8 + i]) * step;
}

DF_WIDE void decode_fp8(const unsigned char* from, uint32_t classes, float* to) {
  const float top = load<float>(from), scale = load<float>(from + 4);
  for (uint32_t i = 0; i < classes; ++i) to[i] = top + fp8_value(from[8 + i]) * scale;
}

}  // namespace

void decode_handful(const RecordLayout& layout, const unsigned char* const* records, size_t count,
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
      const auto decode = layout.k == 16 && layout.id_bytes == 2 ? decode_topk16 : decode_topk_any;
      decode(layout, records, count, static_cast<int32_t*>(out.first) + begin * layout.k,
             out.second + begin * layout.k, out.third + begin);
      return;
    }
    case RecordKind::int8:
    case RecordKind::fp8: {
      auto* to = static_cast<float*>(out.first) + begin * layout.num_classes;
      const auto decode = layout.kind == RecordKind::int8 ? decode_int8 : decode_fp8;
      for (size_t i = 0; i < count; ++i, to += layout.num_classes) {
        decode(records[i], layout.num_classes, to);
      }
    }
  }
}

int64_t decode_rows(const RecordLayout& layout, const unsigned char* table, int64_t num_records,
                    const int64_t* rows, int64_t count, const Decoded& out) {
  const unsigned char* records[kHandful];
  for (int64_t begin = 0; begin < count; begin += kHandful) {
    const auto size = static_cast<size_t>(std::min<int64_t>(kHandful, count - begin));
    for (size_t i = 0; i < size; ++i) {
      const int64_t place = begin + static_cast<int64_t>(i);
      const int64_t row = rows == nullptr ? place : rows[place];
      if (row < 0 || row >= num_records) return place;
      records[i] = table + static_cast<size_t>(row) * layout.record_bytes;
    }
    decode_handful(layout, records, size, out, static_cast<size_t>(begin));
  }
  return -1;
}

int64_t encode_topk(const TopKShape& shape, const float* logits, int64_t count,
                    const int64_t* labels, unsigned char* records) {
  const uint32_t room = std::max(kEncodeKeys, shape.k + 1);
  std::vector<uint64_t> keys(size_t{2} * room);
  EncodeShared shared{};
  shared.keys = keys.data();
  shared.sorted = keys.data() + room;
  for (int64_t i = 0; i < count; ++i) {
    const float* row = logits + i * shape.num_classes;
    const uint32_t label = labels == nullptr ? 0 : static_cast<uint32_t>(labels[i]);
    if (!encode_row(shape, row, label, room, shared, records + i * shape.record_bytes())) return i;
  }
  return -1;
}

}  // namespace deit_fast
