// Records of the teacher-logit cache in a GPU's memory. All pointers are device memory. Work is
// queued on `stream`; nothing waits for it. Throws std::runtime_error with CUDA's message if a
// launch fails.
#pragma once

#include <cstdint>

#include "../record_codec.h"

namespace deit_fast {

enum class FloatType : int { float32, bfloat16, float16 };

// As decode_records, for topk, int8 and fp8.
void cuda_decode_records(const RecordLayout& layout, const unsigned char* records, int64_t count,
                         const Decoded& out, int device, void* stream);

// Limits: k + 1 <= kEncodeKeys, kEncodeTemperatures temperatures, 2^18 classes.
constexpr uint32_t kEncodeTemperatures = 8;

// As encode_topk. *first_bad, set by the caller to a larger number, becomes the first row with a
// value that is not finite; records of such rows are not written.
void cuda_encode_topk(const TopKShape& shape, const void* logits, FloatType type, int64_t count,
                      unsigned char* records, int64_t* first_bad, int device, void* stream);

}  // namespace deit_fast
