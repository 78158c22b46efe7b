// Gather of fixed-size records that already lie on the GPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deit_fast {

// out[i] = record rows[i] of the `num_records` records at `records`; all three pointers are device
// memory. Runs on `stream` and never waits for it. A row outside [0, num_records) stops the kernel
// with a launch failure rather than reading past the end.
// Throws std::runtime_error with CUDA's message where the launch fails.
void gather_records(const void* records, int64_t num_records, int64_t record_bytes,
                    const int64_t* rows, int64_t count, void* out, int device, void* stream);

}  // namespace deit_fast
