#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "gather.h"

namespace deit_fast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65536;  // the loop strides over the rest

// One thread moves one Word; neighbours move neighbouring words, so that loads of a record and all
// stores coalesce.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    gather_words(const Word* __restrict__ records, int64_t num_records, int64_t words_per_record,
                 const int64_t* __restrict__ rows, int64_t total_words, Word* __restrict__ out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total_words;
       i += stride) {
    const int64_t record = i / words_per_record;
    const int64_t row = rows[record];
    if (row < 0 || row >= num_records) __trap();
    out[i] = records[row * words_per_record + (i - record * words_per_record)];
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("gather of cached records: ") + cudaGetErrorString(error));
  }
}

template <typename Word>
void launch(const void* records, int64_t num_records, int64_t record_bytes, const int64_t* rows,
            int64_t count, void* out, cudaStream_t stream) {
  const auto words = record_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t blocks = std::min((count * words + kThreads - 1) / kThreads, kMaxBlocks);
  gather_words<Word><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<const Word*>(records), num_records, words, rows, count * words,
      static_cast<Word*>(out));
  check(cudaGetLastError());
}

}  // namespace

void gather_records(const void* records, int64_t num_records, int64_t record_bytes,
                    const int64_t* rows, int64_t count, void* out, int device, void* stream) {
  if (count == 0) return;
  check(cudaSetDevice(device));  // this runtime is linked in statically and apart from torch's
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  // The widest word that divides the record and both addresses.
  const uintptr_t bits = reinterpret_cast<uintptr_t>(records) | reinterpret_cast<uintptr_t>(out) |
                         static_cast<uintptr_t>(record_bytes);
  const auto run = [&](auto word) {
    launch<decltype(word)>(records, num_records, record_bytes, rows, count, out, cuda_stream);
  };
  if (bits % 16 == 0) return run(uint4{});
  if (bits % 8 == 0) return run(uint2{});
  if (bits % 4 == 0) return run(uint32_t{});
  if (bits % 2 == 0) return run(uint16_t{});
  run(uint8_t{});
}

}  // namespace deit_fast
