// Runs blocks of CUDA threads on a CPU, for tests on machines without a GPU: a C++ compiler compiles
// csrc/cuda unchanged, against the headers of this folder instead of CUDA's.
//
// A thread is a fiber. A seed decides the order of the blocks and which thread continues after each
// barrier, shuffle and atomic; between those a thread is not interrupted. ThreadSanitizer sees a fiber
// as a thread that only barriers order with others, so it reports a conflict in every schedule. The
// blocks of a grid then run on two processors whose threads nothing orders, so that it reports
// conflicts between blocks as well.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

struct Settings {
  uint64_t seed = 1;
  int shared_limit = 232448;      // most bytes that a block may request, as on sm_90
  unsigned max_blocks = 1u << 16;  // a larger grid is cut to this: grid-stride loops do the rest
};
extern Settings settings;

using Kernel = std::function<void()>;
// Null, or why the launch failed: a trap, or threads that wait for others forever.
const char* launch(unsigned blocks, unsigned threads, size_t shared_bytes, int processors,
                   const Kernel& kernel);

// Called by threads of a kernel. `line` is that of the call: all must wait at the same one. barrier
// returns whether any thread's value is true.
bool barrier(bool value, int line);
uint64_t shuffle_xor(uint64_t value, int lanes, int line);
void pause();  // lets other threads run first
[[noreturn]] void trap();
void* dynamic_shared();

}  // namespace emulator

// Of the running thread.
extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;
