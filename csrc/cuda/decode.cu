// Gather and decode in one kernel, so that raw records are not written back to memory.
#include <algorithm>

#include "launch.h"
#include "records.h"

namespace deit_fast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65536;  // loops stride over the rest
constexpr uint32_t kLanes = 32;
constexpr const char* kWhat = "gather of cached records";

struct Table {
  const unsigned char* __restrict__ records;
  int64_t num_records;
  const int64_t* __restrict__ rows;

  __device__ const unsigned char* record(int64_t i, uint32_t record_bytes) const {
    const int64_t row = rows == nullptr ? i : rows[i];
    if (row < 0 || row >= num_records) __trap();
    return records + row * record_bytes;
  }
};

// Adjacent threads move adjacent words, so that loads of a record and all stores coalesce. A thread
// has four words in flight.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    copy_records(Table table, uint32_t record_bytes, uint32_t words, int64_t total,
                 Word* __restrict__ out) {
  constexpr int kInFlight = 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t base = first; base < total; base += stride * kInFlight) {
    Word held[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t i = base + j * stride;
      if (i >= total) continue;
      const int64_t record = i / words;
      const auto* from = reinterpret_cast<const Word*>(table.record(record, record_bytes));
      held[j] = from[i - record * words];
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t i = base + j * stride;
      if (i < total) out[i] = held[j];
    }
  }
}

template <typename Id>
__global__ void __launch_bounds__(kThreads)
    decode_hard(Table table, int64_t count, int64_t* __restrict__ out) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    out[i] = *reinterpret_cast<const Id*>(table.record(i, sizeof(Id)));
  }
}

// Group lanes share a record: 16 if k <= 16, else 32, each taking every 32nd entry.
template <typename Id, uint32_t Group>
__global__ void __launch_bounds__(kThreads)
    decode_topk(RecordLayout layout, Table table, int64_t count, int32_t* __restrict__ ids,
                float* __restrict__ log_probs, float* __restrict__ log_tails) {
  const uint32_t lane = threadIdx.x % Group;
  const uint32_t k = layout.k;
  const float inverse = 1.0f / layout.tau;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / Group);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * (kThreads / Group);
  for (int64_t i = begin + threadIdx.x / Group; i < count; i += stride) {
    const unsigned char* record = table.record(i, layout.record_bytes);
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
    decode_bytes(RecordLayout layout, Table table, int64_t count, float* __restrict__ out) {
  const auto value = [](uint32_t code) {
    return Kind == RecordKind::int8 ? static_cast<float>(code)
                                    : fp8_value(static_cast<uint8_t>(code));
  };
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const unsigned char* record = table.record(i, layout.record_bytes);
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

unsigned blocks_for(int64_t work, int64_t per_block) {
  return static_cast<unsigned>(std::min((work + per_block - 1) / per_block, kMaxBlocks));
}

template <typename Word>
void launch_copy(const RecordLayout& layout, const Table& table, int64_t count, void* out,
                 cudaStream_t stream) {
  const uint32_t words = layout.record_bytes / sizeof(Word);
  const int64_t total = count * words;
  launch(kWhat, stream, blocks_for(total, kThreads * 4), kThreads, 0, copy_records<Word>, table,
         layout.record_bytes, words, total, static_cast<Word*>(out));
}

void copy(const RecordLayout& layout, const Table& table, int64_t count, void* out,
          cudaStream_t stream) {
  // The widest word that divides the record and both addresses.
  const uintptr_t bits = reinterpret_cast<uintptr_t>(table.records) |
                         reinterpret_cast<uintptr_t>(out) | layout.record_bytes;
  if (bits % 16 == 0) return launch_copy<uint4>(layout, table, count, out, stream);
  if (bits % 8 == 0) return launch_copy<uint2>(layout, table, count, out, stream);
  if (bits % 4 == 0) return launch_copy<uint32_t>(layout, table, count, out, stream);
  if (bits % 2 == 0) return launch_copy<uint16_t>(layout, table, count, out, stream);
  launch_copy<uint8_t>(layout, table, count, out, stream);
}

template <typename Id>
void launch_topk(const RecordLayout& layout, const Table& table, int64_t count, const Decoded& out,
                 cudaStream_t stream) {
  auto* ids = static_cast<int32_t*>(out.first);
  const uint32_t group = layout.k <= 16 ? 16 : kLanes;
  const unsigned blocks = blocks_for(count, kThreads / group);
  const auto kernel = group == 16 ? decode_topk<Id, 16> : decode_topk<Id, kLanes>;
  launch(kWhat, stream, blocks, kThreads, 0, kernel, layout, table, count, ids, out.second,
         out.third);
}

template <RecordKind Kind>
void launch_bytes(const RecordLayout& layout, const Table& table, int64_t count, float* out,
                  cudaStream_t stream) {
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(table.records) | reinterpret_cast<uintptr_t>(out);
  const bool wide = layout.num_classes % 4 == 0 && addresses % 16 == 0;
  const auto kernel = wide ? decode_bytes<Kind, true> : decode_bytes<Kind, false>;
  launch(kWhat, stream, blocks_for(count, 1), kThreads, 0, kernel, layout, table, count, out);
}

}  // namespace

void cuda_decode_rows(const RecordLayout& layout, const unsigned char* records, int64_t num_records,
                      const int64_t* rows, int64_t count, const Decoded& out, int device,
                      void* stream_address) {
  if (count == 0) return;
  // The CUDA runtime is linked statically, so it does not share torch's current device.
  check_cuda(cudaSetDevice(device), kWhat);
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const Table table{records, num_records, rows};
  switch (layout.kind) {
    case RecordKind::copy:
      copy(layout, table, count, out.first, stream);
      break;
    case RecordKind::hard: {
      auto* to = static_cast<int64_t*>(out.first);
      const unsigned blocks = blocks_for(count, kThreads);
      if (layout.id_bytes == 2) {
        launch(kWhat, stream, blocks, kThreads, 0, decode_hard<uint16_t>, table, count, to);
      } else {
        launch(kWhat, stream, blocks, kThreads, 0, decode_hard<uint32_t>, table, count, to);
      }
      break;
    }
    case RecordKind::topk:
      if (layout.id_bytes == 2) {
        launch_topk<uint16_t>(layout, table, count, out, stream);
      } else {
        launch_topk<uint32_t>(layout, table, count, out, stream);
      }
      break;
    case RecordKind::int8:
      launch_bytes<RecordKind::int8>(layout, table, count, static_cast<float*>(out.first), stream);
      break;
    case RecordKind::fp8:
      launch_bytes<RecordKind::fp8>(layout, table, count, static_cast<float*>(out.first), stream);
      break;
  }
}

}  // namespace deit_fast
