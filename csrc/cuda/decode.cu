// Decodes records. Those of class ids or plain logits need no kernel: torch reads them as they are.
#include <algorithm>

#include "launch.h"
#include "records.h"

namespace deit_fast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65536;  // loops stride over the rest
constexpr uint32_t kLanes = 32;
constexpr const char* kWhat = "decoding of cached records";

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
  launch(kWhat, stream, blocks, kThreads, 0, kernel, layout, records, count, ids, out.second,
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
  launch(kWhat, stream, blocks_for(count, 1), kThreads, 0, kernel, layout, records, count, out);
}

}  // namespace

void cuda_decode_records(const RecordLayout& layout, const unsigned char* records, int64_t count,
                         const Decoded& out, int device, void* stream_address) {
  if (count == 0) return;
  // The CUDA runtime is linked statically, so it does not share torch's current device.
  check_cuda(cudaSetDevice(device), kWhat);
  const auto stream = static_cast<cudaStream_t>(stream_address);
  switch (layout.kind) {
    case RecordKind::topk:
      if (layout.id_bytes == 2) return launch_topk<uint16_t>(layout, records, count, out, stream);
      return launch_topk<uint32_t>(layout, records, count, out, stream);
    case RecordKind::int8:
      return launch_bytes<RecordKind::int8>(layout, records, count, out, stream);
    case RecordKind::fp8:
      return launch_bytes<RecordKind::fp8>(layout, records, count, out, stream);
    default:
      throw std::runtime_error(std::string(kWhat) + ": no kernel for this kind of record");
  }
}

}  // namespace deit_fast
