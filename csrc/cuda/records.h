// Records of the teacher-logit cache in a GPU's memory. All pointers are device memory; everything
// runs on `stream` and never waits for it. Throws std::runtime_error with CUDA's message where a
// launch fails.
#pragma once

#include <cstdint>

#include "../record_codec.h"

namespace deit_fast {

enum class FloatType : int { float32, bfloat16, float16 };

// As decode_rows. A row outside the table stops the kernel with a launch failure rather than
// reading past the end.
void cuda_decode_rows(const RecordLayout& layout, const unsigned char* table, int64_t num_records,
                      const int64_t* rows, int64_t count, const Decoded& out, int device,
                      void* stream);

// k + 1 at most kEncodeKeys, at most kEncodeTemperatures temperatures, classes 2^18.
constexpr uint32_t kEncodeTemperatures = 8;

// As encode_topk; *first_bad (set beforehand to any larger number) becomes the first row with a
// value that is not finite, whose record then is not written.
void cuda_encode_topk(const TopKShape& shape, const void* logits, FloatType type, int64_t count,
                      const int64_t* labels, unsigned char* records, int64_t* first_bad,
                      int device, void* stream);

}  // namespace deit_fast
