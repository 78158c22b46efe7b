// Helpers of every kernel launch in this folder.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace deit_fast {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

#if defined(__CUDACC__)
// The block's dynamic shared memory; tests/native/emulator has its own.
__device__ __forceinline__ uint4* dynamic_shared() {
  extern __shared__ uint4 dynamic_words[];
  return dynamic_words;
}
#endif

// kernel<<<blocks, threads, dynamic, stream>>>(args...), in syntax that every C++ compiler accepts.
template <typename... Params, typename... Args>
void launch(const char* what, cudaStream_t stream, unsigned blocks, unsigned threads,
            size_t dynamic, void (*kernel)(Params...), Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = dynamic;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), what);
}

}  // namespace deit_fast
