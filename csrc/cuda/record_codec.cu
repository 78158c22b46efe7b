// Records on the device. Those of class ids or plain logits need no kernel: torch reads them as they
// are.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "../record_codec.h"
#include "launch.h"

namespace deit_fast {
namespace {

// -------------------------------------------------------------------------------------------------
// Decoding
// -------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65536;  // loops stride over the rest
constexpr uint32_t kLanes = 32;
constexpr const char* kDecoding = "decoding of cached records";

// Group lanes share a record: 16 if k <= 16, else 32, each taking every 32nd entry.
template <typename Id, uint32_t Group>
__global__ void __launch_bounds__(kThreads)
    decode_topk(RecordLayout layout, const unsigned char* __restrict__ records, int64_t count,
                int32_t* __restrict__ ids, float* __restrict__ log_probs,
                float* __restrict__ log_tails) {
  const uint32_t lane = threadIdx.x % Group;
  const uint32_t k = layout.k;
  const float inverse = 1.0f / layout.tau;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / Group);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kThreads / Group);
  for (int64_t i = begin + threadIdx.x / Group; i < count; i += stride) {
    const unsigned char* record = records + i * layout.record_bytes;
    const auto* from = reinterpret_cast<const uint16_t*>(record + k * sizeof(Id));
    const auto* tail = reinterpret_cast<const uint16_t*>(record + layout.tail_offset);
    const float log_tail = bits_as<float>(tail[0] | (static_cast<uint32_t>(tail[1]) << 16));
    const float shift = bits_as<float>(tail[2] | (static_cast<uint32_t>(tail[3]) << 16));
    for (uint32_t j = lane; j < k; j += Group) {
      const auto* id = reinterpret_cast<const uint16_t*>(record + j * sizeof(Id));
      const uint32_t low = id[0], high = sizeof(Id) == 4 ? id[1] : 0;
      ids[i * k + j] = static_cast<int32_t>(low | (high << 16));
      log_probs[i * k + j] = half_value(from[j]) * inverse - shift;
    }
    if (lane == 0) log_tails[i] = log_tail;
  }
}

struct alignas(16) Float4 {
  float value[4];
};

// A block decodes a record. Wide: four codes at a time, if record and output are aligned to that.
template <RecordKind Kind, bool Wide>
__global__ void __launch_bounds__(kThreads)
    decode_bytes(RecordLayout layout, const unsigned char* __restrict__ records, int64_t count,
                 float* __restrict__ out) {
  const auto value = [](uint32_t code) {
    return Kind == RecordKind::int8 ? static_cast<float>(code)
                                    : fp8_value(static_cast<uint8_t>(code));
  };
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const unsigned char* record = records + i * layout.record_bytes;
    uint32_t words[2] = {0, 0};
    for (int byte = 0; byte < 8; ++byte) {
      words[byte / 4] |= static_cast<uint32_t>(record[byte]) << (8 * (byte % 4));
    }
    const float base = bits_as<float>(words[0]), step = bits_as<float>(words[1]);
    float* to = out + i * layout.num_classes;
    if (Wide) {
      const auto* codes = reinterpret_cast<const uint32_t*>(record + 8);
      for (uint32_t j = threadIdx.x; j < layout.num_classes / 4; j += kThreads) {
        const uint32_t four = codes[j];
        Float4 decoded;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          decoded.value[b] = base + value((four >> (8 * b)) & 0xFF) * step;
        }
        reinterpret_cast<Float4*>(to)[j] = decoded;
      }
    } else {
      for (uint32_t j = threadIdx.x; j < layout.num_classes; j += kThreads) {
        to[j] = base + value(record[8 + j]) * step;
      }
    }
  }
}

// A warp decodes a token. Wide: as above.
template <RecordKind Kind, bool Wide>
__global__ void __launch_bounds__(kThreads)
    decode_tokens(RecordLayout layout, const unsigned char* __restrict__ records, int64_t count,
                  float* __restrict__ out) {
  const auto value = [](uint32_t code) {
    return Kind == RecordKind::token_int8 ? static_cast<float>(static_cast<int8_t>(code))
                                          : fp8_value(static_cast<uint8_t>(code));
  };
  const uint32_t lane = threadIdx.x % kLanes, channels = layout.num_classes;
  const int64_t tokens = count * layout.tokens;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / kLanes);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes);
  for (int64_t i = begin + threadIdx.x / kLanes; i < tokens; i += stride) {
    const unsigned char* token = records + i * (4 + channels);
    uint32_t word = 0;
    for (int byte = 0; byte < 4; ++byte) word |= static_cast<uint32_t>(token[byte]) << (8 * byte);
    const float scale = bits_as<float>(word);
    float* to = out + i * channels;
    if (Wide) {
      const auto* codes = reinterpret_cast<const uint32_t*>(token + 4);
      for (uint32_t j = lane; j < channels / 4; j += kLanes) {
        const uint32_t four = codes[j];
        Float4 decoded;
#pragma unroll
        for (int b = 0; b < 4; ++b) decoded.value[b] = value((four >> (8 * b)) & 0xFF) * scale;
        reinterpret_cast<Float4*>(to)[j] = decoded;
      }
    } else {
      for (uint32_t j = lane; j < channels; j += kLanes) to[j] = value(token[4 + j]) * scale;
    }
  }
}

unsigned blocks_for(int64_t work, int64_t per_block) {
  return static_cast<unsigned>(std::min((work + per_block - 1) / per_block, kMaxBlocks));
}

template <typename Id>
void launch_topk(const RecordLayout& layout, const unsigned char* records, int64_t count,
                 const Decoded& out, cudaStream_t stream) {
  auto* ids = static_cast<int32_t*>(out.first);
  const uint32_t group = layout.k <= 16 ? 16 : kLanes;
  const unsigned blocks = blocks_for(count, kThreads / group);
  const auto kernel = group == 16 ? decode_topk<Id, 16> : decode_topk<Id, kLanes>;
  launch(kDecoding, stream, blocks, kThreads, 0, kernel, layout, records, count, ids, out.second,
         out.third);
}

template <RecordKind Kind>
void launch_bytes(const RecordLayout& layout, const unsigned char* records, int64_t count,
                  const Decoded& decoded, cudaStream_t stream) {
  auto* out = static_cast<float*>(decoded.first);
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(records) | reinterpret_cast<uintptr_t>(out);
  const bool wide = layout.num_classes % 4 == 0 && addresses % 16 == 0;
  const auto kernel = wide ? decode_bytes<Kind, true> : decode_bytes<Kind, false>;
  launch(kDecoding, stream, blocks_for(count, 1), kThreads, 0, kernel, layout, records, count, out);
}

template <RecordKind Kind>
void launch_tokens(const RecordLayout& layout, const unsigned char* records, int64_t count,
                   const Decoded& decoded, cudaStream_t stream) {
  auto* out = static_cast<float*>(decoded.first);
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(records) | reinterpret_cast<uintptr_t>(out);
  const bool wide = layout.num_classes % 4 == 0 && addresses % 16 == 0;
  const auto kernel = wide ? decode_tokens<Kind, true> : decode_tokens<Kind, false>;
  const unsigned blocks = blocks_for(count * layout.tokens, kThreads / kLanes);
  launch(kDecoding, stream, blocks, kThreads, 0, kernel, layout, records, count, out);
}

// -------------------------------------------------------------------------------------------------
// Encoding of top-k records, one block for each row. A row that fits into shared memory (50,000
// float32 classes on sm_90) is read from memory once; a wider one is read again, through L2.
// -------------------------------------------------------------------------------------------------

constexpr const char* kEncoding = "encoding of teacher logits";

struct Temperatures {
  double inverse[kEncodeTemperatures];
};

// The threads of a block, each with its part of the work; a barrier ends every step.
struct CudaBlock {
  uint64_t* partial;  // one for each warp

  template <typename Body>
  __device__ __forceinline__ void each(Body body) {
    body(threadIdx.x);
    __syncthreads();
  }
  template <typename Body>
  __device__ __forceinline__ bool any(Body body) {
    return __syncthreads_or(body(threadIdx.x));
  }
  template <typename Term>
  __device__ __forceinline__ uint64_t total(uint32_t count, Term term) {
    unsigned long long sum = 0;
    for (uint32_t i = threadIdx.x; i < count; i += kEncodeThreads) sum += term(i);
    for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, half);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (uint32_t warp = 0; warp < kEncodeThreads / 32; ++warp) sum += partial[warp];
    __syncthreads();
    return sum;
  }
  __device__ __forceinline__ uint32_t add(uint32_t* counter, uint32_t amount) {
    return atomicAdd(counter, amount);
  }
  // The index of a key is the number of larger keys, since keys are distinct.
  __device__ __forceinline__ void sort_descending(const uint64_t* keys, uint32_t count,
                                                  uint64_t* sorted, uint32_t kept) {
    for (uint32_t i = threadIdx.x; i < count; i += kEncodeThreads) {
      const uint64_t mine = keys[i];
      uint32_t larger = 0;
      for (uint32_t j = 0; j < count; ++j) larger += keys[j] > mine;
      if (larger < kept) sorted[larger] = mine;
    }
    __syncthreads();
  }
};

// Copies a row to shared memory, 16 bytes at a time, and the values at its unaligned ends one by
// one.
template <typename Float>
__device__ void stage(const Float* __restrict__ row, uint32_t count, Float* staged) {
  constexpr uint32_t kPerWord = 16 / sizeof(Float);
  const auto askew = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(Float));
  const uint32_t head = min(askew == 0 ? 0 : kPerWord - askew, count);
  const uint32_t words = (count - head) / kPerWord;
  for (uint32_t i = threadIdx.x; i < head; i += kEncodeThreads) staged[i] = row[i];
  const auto* from = reinterpret_cast<const uint4*>(row + head);
  for (uint32_t i = threadIdx.x; i < words; i += kEncodeThreads) {
    const uint4 word = from[i];
    memcpy(staged + head + i * kPerWord, &word, 16);
  }
  for (uint32_t i = head + words * kPerWord + threadIdx.x; i < count; i += kEncodeThreads) {
    staged[i] = row[i];
  }
  __syncthreads();
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

// Eight blocks fit into a multiprocessor at 64 registers a thread; without the number ptxas takes 56
// for sm_100, and spills.
template <typename Float, bool Staged>
__global__ void __launch_bounds__(kEncodeThreads, 8)
    encode_rows(TopKShape shape, Temperatures temperatures, const Float* __restrict__ logits,
                int64_t count, unsigned char* __restrict__ records,
                int64_t* __restrict__ first_bad) {
  __shared__ EncodeShared shared;
  __shared__ uint64_t keys[kEncodeKeys];
  __shared__ uint64_t sorted[kEncodeKeys];
  __shared__ uint64_t partial[kEncodeThreads / 32];
  __shared__ double inverse[kEncodeTemperatures];
  if (threadIdx.x == 0) {
    shared.keys = keys;
    shared.sorted = sorted;
    for (uint32_t t = 0; t < kEncodeTemperatures; ++t) inverse[t] = temperatures.inverse[t];
  }
  __syncthreads();
  shape.inverse_temperatures = inverse;
  CudaBlock block{partial};
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const Float* row = logits + i * shape.num_classes;
    unsigned char* record = records + i * shape.record_bytes();
    bool good = false;
    if (Staged) {
      auto* staged = reinterpret_cast<Float*>(dynamic_shared());
      stage(row, shape.num_classes, staged);
      good = encode_topk_row(
          block, shape, [staged](uint32_t j) { return widen(staged[j]); }, kEncodeKeys, shared,
          record);
    } else {
      good = encode_topk_row(
          block, shape, [row](uint32_t j) { return widen(row[j]); }, kEncodeKeys, shared, record);
    }
    if (!good && threadIdx.x == 0) {
      atomicMin(reinterpret_cast<long long*>(first_bad), static_cast<long long>(i));
    }
    __syncthreads();
  }
}

template <typename Float>
void encode(const TopKShape& shape, const Temperatures& temperatures, const void* logits,
            int64_t count, unsigned char* records, int64_t* first_bad, int device,
            cudaStream_t stream) {
  constexpr size_t kStatic = sizeof(EncodeShared) + 2 * 8 * kEncodeKeys + 1024;
  int limit = 0;
  check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             kEncoding);
  const size_t needed = (shape.num_classes * sizeof(Float) + 15) / 16 * 16;
  const bool staged = needed + kStatic <= static_cast<size_t>(limit);
  const auto kernel = staged ? encode_rows<Float, true> : encode_rows<Float, false>;
  const size_t dynamic = staged ? needed : 0;
  if (staged) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(dynamic)),
               kEncoding);
  }
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(count, 65536));
  launch(kEncoding, stream, blocks, kEncodeThreads, dynamic, kernel, shape, temperatures,
         static_cast<const Float*>(logits), count, records, first_bad);
}

}  // namespace

void cuda_decode_records(const RecordLayout& layout, const unsigned char* records, int64_t count,
                         const Decoded& out, int device, void* stream_address) {
  if (count == 0) return;
  // The CUDA runtime is linked statically, so it does not share torch's current device.
  check_cuda(cudaSetDevice(device), kDecoding);
  const auto stream = static_cast<cudaStream_t>(stream_address);
  switch (layout.kind) {
    case RecordKind::topk:
      if (layout.id_bytes == 2) return launch_topk<uint16_t>(layout, records, count, out, stream);
      return launch_topk<uint32_t>(layout, records, count, out, stream);
    case RecordKind::int8:
      return launch_bytes<RecordKind::int8>(layout, records, count, out, stream);
    case RecordKind::fp8:
      return launch_bytes<RecordKind::fp8>(layout, records, count, out, stream);
    case RecordKind::token_int8:
      return launch_tokens<RecordKind::token_int8>(layout, records, count, out, stream);
    case RecordKind::token_fp8:
      return launch_tokens<RecordKind::token_fp8>(layout, records, count, out, stream);
    default:
      throw std::runtime_error(std::string(kDecoding) + ": no kernel for this kind of record");
  }
}

void cuda_encode_topk(const TopKShape& shape, const void* logits, FloatType type, int64_t count,
                      unsigned char* records, int64_t* first_bad, int device,
                      void* stream_address) {
  if (count == 0) return;
  if (shape.k >= kEncodeKeys || shape.temperatures > kEncodeTemperatures) {
    throw std::runtime_error(std::string(kEncoding) + ": k or temperatures beyond the kernel's");
  }
  check_cuda(cudaSetDevice(device), kEncoding);
  Temperatures temperatures{};
  std::copy(shape.inverse_temperatures, shape.inverse_temperatures + shape.temperatures,
            temperatures.inverse);
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const auto run = [&](auto example) {
    encode<decltype(example)>(shape, temperatures, logits, count, records, first_bad, device,
                              stream);
  };
  switch (type) {
    case FloatType::float32:
      return run(float{});
    case FloatType::bfloat16:
      return run(__nv_bfloat16{});
    case FloatType::float16:
      return run(__half{});
  }
}

}  // namespace deit_fast
