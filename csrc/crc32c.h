// CRC32C (Castagnoli, reflected polynomial 0x82F63B78), the checksum of iSCSI, ext4 and this cache.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deit_fast {

// Checksum of `size` bytes; pass an earlier result as `crc` to continue it. Uses the
// CPU's CRC instruction where there is one.
uint32_t crc32c(const void* data, size_t size, uint32_t crc = 0);

// Its two implementations, for tests: eight tables, and the CPU's instruction (call it only if
// crc32c_has_hardware()).
uint32_t crc32c_table(const void* data, size_t size, uint32_t crc = 0);
uint32_t crc32c_hardware(const void* data, size_t size, uint32_t crc = 0);
bool crc32c_has_hardware();

}  // namespace deit_fast
