// Encodes logits as top-k records and decodes records of every codec, on the host (record_codec.cpp)
// and on the device (cuda/record_codec.cu); both use the arithmetic of the shared headers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "topk_encode.h"

namespace deit_fast {

// How a record's bytes become numbers; see docs/cache-format.md.
enum class RecordKind : int { copy, hard, topk, int8, fp8, token_int8, token_fp8 };

struct RecordLayout {
  RecordKind kind = RecordKind::copy;
  uint32_t record_bytes = 0;
  uint32_t num_classes = 0;  // token_int8, token_fp8: channels of a token
  uint32_t id_bytes = 2;
  uint32_t k = 0;            // topk
  uint32_t tail_offset = 0;  // topk: of the tail mass at `tau`; its normaliser comes next
  float tau = 1.0f;          // topk
  uint32_t tokens = 1;       // token_int8, token_fp8: each a float32 scale and a byte per channel
};

// Outputs of `count` decoded records, by kind:
//   copy  first: the bytes
//   hard  first: int64 [count]
//   topk  first: int32 [count, k] ids; second: float32 [count, k] log-probabilities at tau;
//         third: float32 [count] log tail
//   int8, fp8  first: float32 [count, num_classes] logits
//   token_int8, token_fp8  first: float32 [count, tokens, num_classes] features
struct Decoded {
  void* first = nullptr;
  float* second = nullptr;
  float* third = nullptr;
};

// Number of records that are decoded together: their cache misses overlap.
constexpr size_t kDecodeBatch = 16;

// Decodes count <= kDecodeBatch records to rows [begin, begin + count) of `out`.
void decode_batch(const RecordLayout& layout, const unsigned char* const* records, size_t count,
                  const Decoded& out, size_t begin);

// Decodes `count` adjacent records.
void decode_records(const RecordLayout& layout, const unsigned char* records, size_t count,
                    const Decoded& out);

// Encodes float32 logits [count, num_classes]. Returns the first row with a value that is not
// finite, or -1.
int64_t encode_topk(const TopKShape& shape, const float* logits, int64_t count,
                    unsigned char* records);

// The same for records in a GPU's memory, in builds with CUDA. All pointers are device memory. Work
// is queued on `stream`; nothing waits for it. Throws std::runtime_error with CUDA's message if a
// launch fails.

enum class FloatType : int { float32, bfloat16, float16 };

// As decode_records, for every kind but copy and hard.
void cuda_decode_records(const RecordLayout& layout, const unsigned char* records, int64_t count,
                         const Decoded& out, int device, void* stream);

// Limits: k + 1 <= kEncodeKeys, kEncodeTemperatures temperatures, 2^18 classes.
constexpr uint32_t kEncodeTemperatures = 8;

// As encode_topk. *first_bad, set by the caller to a larger number, becomes the first row with a
// value that is not finite; records of such rows are not written.
void cuda_encode_topk(const TopKShape& shape, const void* logits, FloatType type, int64_t count,
                      unsigned char* records, int64_t* first_bad, int device, void* stream);

}  // namespace deit_fast
