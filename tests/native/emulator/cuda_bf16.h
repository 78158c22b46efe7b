#pragma once

#include "../../../csrc/arithmetic.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  return deit_fast::bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}
