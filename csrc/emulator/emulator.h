// Blocks of CUDA threads on a CPU, for tests on machines without a GPU: csrc/cuda is compiled as it
// stands by a C++ compiler, against the headers of this folder instead of CUDA's.
//
// A thread is a fiber. A seed decides the order of the blocks, and which thread runs on after each
// barrier, shuffle and atomic; between those a thread is not interrupted. Under ThreadSanitizer a
// fiber counts as a thread that barriers alone order with others, so a conflict is reported whether
// or not it did harm in this schedule. The blocks of a grid are then shared by two processors, whose
// threads nothing orders, so that conflicts between blocks are seen as well.
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
  int shared_limit = 232448;      // bytes a block may ask for, at most; that of sm_90
  unsigned max_blocks = 1u << 16;  // a larger grid becomes this one: loops over it must take the rest
};
extern Settings settings;

using Kernel = std::function<void()>;
// Null, or why the launch failed: a trap, or threads that wait for others in vain.
const char* launch(unsigned blocks, unsigned threads, size_t shared_bytes, int processors,
                   const Kernel& kernel);

// Called by threads of a kernel. `line` is the call's: all must wait at the same. barrier returns
// whether any thread's value is true.
bool barrier(bool value, int line);
uint64_t shuffle_xor(uint64_t value, int lanes, int line);
void pause();  // others may run first
[[noreturn]] void trap();
void* dynamic_shared();

}  // namespace emulator

// Of the thread that runs now.
extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;
