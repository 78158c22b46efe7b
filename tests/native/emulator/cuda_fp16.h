#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};
inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 0x1F, fraction = value.bits & 0x3FF;
  float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                             : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  if (exponent == 0x1F) size = fraction == 0 ? INFINITY : NAN;
  return value.bits >> 15 ? -size : size;
}
