#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#define CRC_TARGET __attribute__((target("sse4.2")))
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#define CRC_TARGET __attribute__((target("+crc")))
#endif

namespace deit_fast {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][byte]: effect of a byte followed by k further bytes, so that one step takes eight
// bytes.
Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78u : 0u);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}

uint64_t load_word(const unsigned char* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

}  // namespace

uint32_t crc32c_table(const void* data, size_t size, uint32_t crc) {
  static const Tables tables = make_tables();
  const auto* bytes = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; size >= 8; size -= 8, bytes += 8) {
    const uint64_t word = load_word(bytes) ^ crc;
    crc = 0;
    for (size_t i = 0; i < 8; ++i) crc ^= tables[7 - i][(word >> (8 * i)) & 0xFF];
  }
  for (; size > 0; --size, ++bytes) crc = (crc >> 8) ^ tables[0][(crc ^ *bytes) & 0xFF];
  return ~crc;
}

#if defined(CRC_TARGET)

CRC_TARGET uint32_t crc32c_hardware(const void* data, size_t size, uint32_t crc) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  crc = ~crc;
#if defined(__x86_64__)
  uint64_t wide = crc;
  for (; size >= 8; size -= 8, bytes += 8) wide = _mm_crc32_u64(wide, load_word(bytes));
  crc = static_cast<uint32_t>(wide);
  for (; size > 0; --size, ++bytes) crc = _mm_crc32_u8(crc, *bytes);
#else
  for (; size >= 8; size -= 8, bytes += 8) crc = __crc32cd(crc, load_word(bytes));
  for (; size > 0; --size, ++bytes) crc = __crc32cb(crc, *bytes);
#endif
  return ~crc;
}

bool crc32c_has_hardware() {
#if defined(__x86_64__)
  static const bool found = __builtin_cpu_supports("sse4.2");
#else
  static const bool found = (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#endif
  return found;
}

#else

uint32_t crc32c_hardware(const void* data, size_t size, uint32_t crc) {
  return crc32c_table(data, size, crc);
}

bool crc32c_has_hardware() { return false; }

#endif

uint32_t crc32c(const void* data, size_t size, uint32_t crc) {
  return crc32c_has_hardware() ? crc32c_hardware(data, size, crc) : crc32c_table(data, size, crc);
}

}  // namespace deit_fast
