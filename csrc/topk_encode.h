// Encodes one row of logits as a top-k record, written for a block of threads. A CUDA block runs
// the threads in parallel, a CPU one after another. Selection is exact and sums are integers, so
// the bytes of the record depend neither on the device nor on the number of threads.
#pragma once

#include "arithmetic.h"

namespace deit_fast {

struct TopKShape {
  uint32_t num_classes;
  uint32_t k;         // 1 to num_classes
  uint32_t id_bytes;  // 2 or 4
  uint32_t temperatures;
  const double* inverse_temperatures;  // at which tail and normaliser are stored

  HOST_DEVICE uint32_t probs_offset() const { return k * id_bytes; }
  HOST_DEVICE uint32_t tail_offset() const { return probs_offset() + 2 * k; }
  HOST_DEVICE uint32_t record_bytes() const { return tail_offset() + 8 * temperatures; }
};

constexpr uint32_t kEncodeThreads = 128;
constexpr uint32_t kEncodeKeys = 1024;  // capacity for candidates

// Shared by the threads of a block. keys and sorted hold max(kEncodeKeys, k + 1) keys.
struct EncodeShared {
  uint64_t best[kEncodeThreads];
  uint64_t threshold;
  uint32_t found;
  uint64_t* keys;
  uint64_t* sorted;
};

HOST_DEVICE void put_float(unsigned char* to, float value) {  // 2-byte aligned
  const auto bits = bits_as<uint32_t>(value);
  const auto low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits >> 16);
  memcpy(to, &low, 2);
  memcpy(to + 2, &high, 2);
}

// Log of the sum of all e^(z/T), and the logs of its shares inside and outside the top k.
struct Normaliser {
  double log_sum;
  double log_inside;
  double log_tail;
};
HOST_DEVICE Normaliser normaliser(double inside_shift, uint64_t inside, double outside_shift,
                              uint64_t outside) {
  const double a = inside_shift + log_of(static_cast<double>(inside) * kUnit);
  const double b = outside_shift + log_of(static_cast<double>(outside) * kUnit);
  const double d = a - b;
  const double correction = log_of(1.0 + exp_of(d > 0 ? -d : d));
  return {(d > 0 ? a : b) + correction, d > 0 ? -correction : d - correction,
          d > 0 ? -(d + correction) : -correction};
}

// Collects the keys that are at least shared.threshold. shared.found counts all of them, also those
// beyond `room`, which are dropped.
template <typename Block, typename Row>
HOST_DEVICE void collect(Block& block, Row row, uint32_t count, uint32_t room,
                         EncodeShared& shared) {
  block.each([&](uint32_t thread) {
    if (thread == 0) shared.found = 0;
  });
  block.each([&](uint32_t thread) {
    for (uint32_t i = thread; i < count; i += kEncodeThreads) {
      const uint64_t key = key_of(row(i), i);
      if (key < shared.threshold) continue;
      const uint32_t index = block.add(&shared.found, 1);
      if (index < room) shared.keys[index] = key;
    }
  });
}

// Puts the `kept` largest keys of the row, descending, into shared.sorted; false if a value is not
// finite. room >= kept.
template <typename Block, typename Row>
HOST_DEVICE bool select_largest(Block& block, Row row, uint32_t count, uint32_t kept, uint32_t room,
                            EncodeShared& shared) {
  const bool bad = block.any([&](uint32_t thread) {
    uint64_t best = 0;
    bool finite = true;
    for (uint32_t i = thread; i < count; i += kEncodeThreads) {
      const float value = row(i);
      finite = finite && is_finite(value);
      const uint64_t key = key_of(value, i);
      best = key > best ? key : best;
    }
    shared.best[thread] = best;
    return !finite;
  });
  if (bad) return false;
  // The kept-th largest of the threads' best keys is a threshold that at least `kept` keys pass,
  // and in a row without a pattern few more.
  uint32_t passed = room + 1;
  if (kept <= kEncodeThreads && kept <= count) {
    block.each([&](uint32_t thread) {
      const uint64_t mine = shared.best[thread];
      uint32_t larger = 0;
      for (uint32_t i = 0; i < kEncodeThreads; ++i) larger += shared.best[i] > mine;
      if (larger == kept - 1 && mine > 0) shared.threshold = mine;
    });
    collect(block, row, count, room, shared);
    passed = shared.found;
  }
  if (passed > room) {  // a row with a pattern, or a large k: bisect for the exact key
    uint64_t threshold = 0;
    for (int bit = 63; bit >= 0; --bit) {
      const uint64_t trial = threshold | (uint64_t{1} << bit);
      const uint64_t passing =
          block.total(count, [&](uint32_t i) -> uint64_t { return key_of(row(i), i) >= trial; });
      if (passing >= kept) threshold = trial;
    }
    block.each([&](uint32_t thread) {
      if (thread == 0) shared.threshold = threshold;
    });
    collect(block, row, count, room, shared);
    passed = shared.found;
  }
  block.sort_descending(shared.keys, passed, shared.sorted, kept);
  return true;
}

// Writes the record of a row; returns false and writes nothing if a value of it is not finite.
template <typename Block, typename Row>
HOST_DEVICE bool encode_topk_row(Block& block, const TopKShape& shape, Row row, uint32_t room,
                                 EncodeShared& shared, unsigned char* record) {
  const uint32_t count = shape.num_classes, k = shape.k;
  const bool whole = k == count;
  if (!select_largest(block, row, count, whole ? k : k + 1, room, shared)) return false;

  const double top = value_of(shared.sorted[0]);
  const double next = whole ? top : value_of(shared.sorted[k]);
  const auto normalise = [&](double inverse) -> Normaliser {
    const uint64_t inside = block.total(k, [&](uint32_t i) {
      return exp_units((value_of(shared.sorted[i]) - top) * inverse);
    });
    if (whole) {
      const double sum = top * inverse + log_of(static_cast<double>(inside) * kUnit);
      return {sum, 0.0, -bits_as<double>(uint64_t{0x7FF0000000000000})};
    }
    // Every class inside contributes exactly one here, since it is at least `next`.
    const uint64_t all = block.total(
        count, [&](uint32_t i) { return exp_units((row(i) - next) * inverse); });
    return normaliser(top * inverse, inside, next * inverse, all - k * kOne);
  };

  const Normaliser at_one = normalise(1.0);
  const auto stored = [&](uint32_t i) -> uint16_t {
    const double log_prob = value_of(shared.sorted[i]) - at_one.log_sum;
    return half_bits(static_cast<float>(log_prob > -65504.0 ? log_prob : -65504.0));
  };
  const double first = half_value(stored(0));
  for (uint32_t t = 0; t < shape.temperatures; ++t) {
    const double inverse = shape.inverse_temperatures[t];
    const Normaliser at = inverse == 1.0 ? at_one : normalise(inverse);
    // From the stored values, not the logits, so that their rounding does not change the mass.
    const uint64_t rounded = block.total(k, [&](uint32_t i) {
      return exp_units((half_value(stored(i)) - first) * inverse);
    });
    const double shift =
        first * inverse + log_of(static_cast<double>(rounded) * kUnit) - at.log_inside;
    block.each([&](uint32_t thread) {
      if (thread != 0) return;
      put_float(record + shape.tail_offset() + 8 * t, static_cast<float>(at.log_tail));
      put_float(record + shape.tail_offset() + 8 * t + 4, static_cast<float>(shift));
    });
  }
  block.each([&](uint32_t thread) {
    for (uint32_t i = thread; i < k; i += kEncodeThreads) {
      const uint32_t id = id_of(shared.sorted[i]);
      if (shape.id_bytes == 2) {
        const auto narrow = static_cast<uint16_t>(id);
        memcpy(record + 2 * i, &narrow, 2);
      } else {
        const auto low = static_cast<uint16_t>(id), high = static_cast<uint16_t>(id >> 16);
        memcpy(record + 4 * i, &low, 2);
        memcpy(record + 4 * i + 2, &high, 2);
      }
      const uint16_t half = stored(i);
      memcpy(record + shape.probs_offset() + 2 * i, &half, 2);
    }
  });
  return true;
}

}  // namespace deit_fast
