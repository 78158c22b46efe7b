// What every launch of this folder needs.
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

}  // namespace deit_fast
