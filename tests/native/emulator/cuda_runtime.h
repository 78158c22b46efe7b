// The part of CUDA that csrc/cuda uses, for a C++ compiler. See emulator.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <tuple>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// The blocks of one processor use the same shared memory one after another. A single processor needs
// no thread_local, around which AddressSanitizer has no red zones.
#if DF_PROCESSORS == 1
#define __shared__ static
#else
#define __shared__ thread_local
#endif

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4* dynamic_shared() { return static_cast<uint4*>(emulator::dynamic_shared()); }

inline void __syncthreads(int line = __builtin_LINE()) { emulator::barrier(false, line); }
inline int __syncthreads_or(int value, int line = __builtin_LINE()) {
  return emulator::barrier(value != 0, line);
}
inline void __trap() { emulator::trap(); }
inline unsigned long long __shfl_xor_sync(unsigned mask, unsigned long long value, int lanes,
                                          int line = __builtin_LINE()) {
  if (mask != 0xFFFFFFFFu) emulator::trap();  // partial warps are not supported
  return emulator::shuffle_xor(value, lanes, line);
}
inline unsigned atomicAdd(unsigned* address, unsigned amount) {
  emulator::pause();
  return __atomic_fetch_add(address, amount, __ATOMIC_RELAXED);
}
inline long long atomicMin(long long* address, long long value) {
  emulator::pause();
  long long before = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < before && !__atomic_compare_exchange_n(address, &before, value, true,
                                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidConfiguration,
  cudaErrorLaunchFailure
};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulator {
inline std::string failure;
inline std::map<const void*, int> granted;  // dynamic shared memory, by kernel
}  // namespace emulator

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulator::failure.c_str() : "refused before the launch";
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::settings.shared_limit;
  return cudaSuccess;
}
template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > emulator::settings.shared_limit) return cudaErrorInvalidValue;
  emulator::granted[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

// Returns after the kernel has ended, and with its error, if any.
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  if (blocks == 0 || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  const auto grant = emulator::granted.find(reinterpret_cast<const void*>(kernel));
  const size_t most = grant == emulator::granted.end() ? 49152 : static_cast<size_t>(grant->second);
  if (config->dynamicSmemBytes > most) return cudaErrorInvalidValue;
  const std::tuple<Params...> values(static_cast<Params>(args)...);
  const char* failure = emulator::launch(blocks, threads, config->dynamicSmemBytes, DF_PROCESSORS,
                                         [&] { std::apply(kernel, values); });
  if (failure == nullptr) return cudaSuccess;
  emulator::failure = failure;
  return cudaErrorLaunchFailure;
}
