#include "tail_draws.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "arithmetic.h"

// As in record_codec.cpp: both versions give the same bits.
#if defined(__x86_64__) && defined(__linux__)
#define DF_WIDE __attribute__((target_clones("avx2", "default")))
#else
#define DF_WIDE
#endif

namespace deit_fast {
namespace {

// The weights of a row's classes, and their sum: below 2^62 for up to 2^18 classes.
DF_WIDE uint64_t weigh(const float* row, uint32_t classes, double largest, double inverse,
                       uint64_t* weights) {
  uint64_t sum = 0;
  for (uint32_t i = 0; i < classes; ++i) {
    weights[i] = exp_units((row[i] - largest) * inverse);
    sum += weights[i];
  }
  return sum;
}

// floor(word * sum / 2^32), for sum < 2^63.
uint64_t share_of(uint64_t sum, uint32_t word) {
  return (sum >> 32) * word + (((sum & 0xFFFFFFFFu) * word) >> 32);
}

}  // namespace

void draw_tails(const DrawShape& shape, const float* logits, const int32_t* heads,
                const uint32_t* words, int64_t count, int32_t* ids) {
  const uint32_t classes = shape.num_classes;
  std::vector<float> row(classes);
  std::vector<uint64_t> weights(classes);
  std::vector<uint32_t> ascending(shape.draws);
  for (int64_t n = 0; n < count; ++n) {
    std::copy(logits + n * classes, logits + (n + 1) * classes, row.begin());
    for (uint32_t i = 0; i < shape.k; ++i) {
      row[heads[n * shape.k + i]] = -std::numeric_limits<float>::infinity();  // of weight 0
    }
    const double largest = *std::max_element(row.begin(), row.end());
    std::copy(words + n * shape.draws, words + (n + 1) * shape.draws, ascending.begin());
    std::sort(ascending.begin(), ascending.end());
    for (uint32_t t = 0; t < shape.temperatures; ++t) {
      const double inverse = shape.inverse_temperatures[t];
      const uint64_t sum = weigh(row.data(), classes, largest, inverse, weights.data());
      uint32_t id = 0;
      uint64_t below = 0;  // of the running sum, before `id`
      for (const uint32_t word : ascending) {
        const uint64_t target = share_of(sum, word);  // < sum, so that the loop ends
        while (target - below >= weights[id]) below += weights[id++];
        *ids++ = static_cast<int32_t>(id);
      }
    }
  }
}

}  // namespace deit_fast
