// Draws classes outside a record's head, with replacement, each with its probability there.
#pragma once

#include <cstdint>

namespace deit_fast {

struct DrawShape {
  uint32_t num_classes;
  uint32_t k;      // classes of the head; k < num_classes
  uint32_t draws;  // for each temperature
  uint32_t temperatures;
  const double* inverse_temperatures;
};

// For each of `count` rows and each temperature the ids that `draws` uniform words choose,
// ascending: int32 [count, temperatures, draws].
//
//   logits  float32 [count, num_classes], finite
//   heads   int32 [count, k], distinct ids in [0, num_classes)
//   words   uint32 [count, draws]; the same for all temperatures
//
// A class has the weight e^((z - largest)/T) in units of 2^-44, `largest` being the largest z
// outside the head; a word u chooses the class that holds floor(u * sum / 2^32) of the weights'
// running sum. All that is exact in integers: the ids depend neither on the machine nor on the
// batch, and a class's chance differs from its share of the weights by less than 2^-32.
void draw_tails(const DrawShape& shape, const float* logits, const int32_t* heads,
                const uint32_t* words, int64_t count, int32_t* ids);

}  // namespace deit_fast
