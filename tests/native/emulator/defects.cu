// Kernels with one defect each, which the emulator and the sanitizers must report.
#include <map>
#include <string>

#include "../../../csrc/cuda/launch.h"

namespace {

constexpr unsigned kThreads = 64;

__global__ void no_barrier(unsigned* out) {
  __shared__ unsigned values[kThreads];
  values[threadIdx.x] = threadIdx.x;
  out[blockIdx.x * kThreads + threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// Correct in every schedule here, and still a race: a shuffle does not order memory.
__global__ void shuffle_for_barrier(unsigned* out) {
  __shared__ unsigned values[kThreads];
  values[threadIdx.x] = threadIdx.x;
  __shfl_xor_sync(0xFFFFFFFFu, 0, 1);
  out[blockIdx.x * kThreads + threadIdx.x] = values[threadIdx.x ^ 1];
}

__global__ void divergent_barrier(unsigned* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = 0;
}

__global__ void two_barriers(unsigned* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = 0;
}

__global__ void half_a_warp(unsigned* out) {
  if (threadIdx.x < 16) __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
  out[blockIdx.x * kThreads + threadIdx.x] = 0;
}

__global__ void beyond_shared(unsigned* out) {
  __shared__ unsigned values[kThreads];
  values[threadIdx.x] = 0;
  __syncthreads();
  unsigned* next = values + blockIdx.x * kThreads;
  out[threadIdx.x] = next[threadIdx.x];
}

__global__ void beyond_dynamic(unsigned* out) {
  using namespace deit_fast;
  reinterpret_cast<unsigned*>(dynamic_shared())[threadIdx.x + 1] = out[threadIdx.x];
}

__global__ void beyond_global(unsigned* out) { out[blockIdx.x * kThreads + threadIdx.x + 1] = 0; }

__global__ void misaligned(unsigned* out) {
  *reinterpret_cast<uint2*>(out + 2 * (threadIdx.x / 4) + 1) = uint2{1, 2};
}

__global__ void blocks_at_odds(unsigned* out) {
  if (threadIdx.x == 0) out[0] = blockIdx.x;
}

}  // namespace

void run_defect(const std::string& name) {
  const std::map<std::string, void (*)(unsigned*)> all = {
      {"no_barrier", no_barrier},           {"shuffle_for_barrier", shuffle_for_barrier},
      {"divergent_barrier", divergent_barrier}, {"two_barriers", two_barriers},
      {"half_a_warp", half_a_warp},         {"beyond_shared", beyond_shared},
      {"beyond_dynamic", beyond_dynamic},   {"beyond_global", beyond_global},
      {"misaligned", misaligned},           {"blocks_at_odds", blocks_at_odds}};
  auto* out = new unsigned[2 * kThreads]();
  deit_fast::launch(name.c_str(), nullptr, 2, kThreads, 4 * kThreads, all.at(name), out);
  delete[] out;
}
