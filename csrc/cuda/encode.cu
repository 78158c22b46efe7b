// Top-k records from logits, one block for each row. A row that fits into shared memory (50,000
// float32 classes on sm_90) is read from memory once; a wider one is read again, through L2.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "launch.h"
#include "records.h"

namespace deit_fast {
namespace {

constexpr const char* kWhat = "encoding of teacher logits";

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
             kWhat);
  const size_t needed = (shape.num_classes * sizeof(Float) + 15) / 16 * 16;
  const bool staged = needed + kStatic <= static_cast<size_t>(limit);
  const auto kernel = staged ? encode_rows<Float, true> : encode_rows<Float, false>;
  const size_t dynamic = staged ? needed : 0;
  if (staged) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(dynamic)),
               kWhat);
  }
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(count, 65536));
  launch(kWhat, stream, blocks, kEncodeThreads, dynamic, kernel, shape, temperatures,
         static_cast<const Float*>(logits), count, records, first_bad);
}

}  // namespace

void cuda_encode_topk(const TopKShape& shape, const void* logits, FloatType type, int64_t count,
                      unsigned char* records, int64_t* first_bad, int device,
                      void* stream_address) {
  if (count == 0) return;
  if (shape.k >= kEncodeKeys || shape.temperatures > kEncodeTemperatures) {
    throw std::runtime_error(std::string(kWhat) + ": k or temperatures beyond the kernel's");
  }
  check_cuda(cudaSetDevice(device), kWhat);
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
