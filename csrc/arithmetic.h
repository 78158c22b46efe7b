// Arithmetic of the codecs, one source for host and device. It consists of IEEE additions,
// multiplications and divisions in a fixed order, so that a CPU and a GPU compute the same bits.
// Compile with contraction off (-ffp-contract=off, --fmad=false): a fused multiply-add rounds once
// instead of twice.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace deit_fast {

template <typename To, typename From>
HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Sort key: the order of a finite float in the high half (-0.0 equals 0.0), ~id in the low half. So
// the keys of a row are distinct, and in descending order equal values ascend by id.
HOST_DEVICE uint64_t key_of(float value, uint32_t id) {
  const auto bits = bits_as<uint32_t>(value + 0.0f);
  const uint32_t ordered = bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
  return (static_cast<uint64_t>(ordered) << 32) | (0xFFFFFFFFu - id);
}
HOST_DEVICE uint32_t id_of(uint64_t key) { return 0xFFFFFFFFu - static_cast<uint32_t>(key); }
HOST_DEVICE float value_of(uint64_t key) {
  const auto ordered = static_cast<uint32_t>(key >> 32);
  return bits_as<float>(ordered ^ (ordered >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

HOST_DEVICE bool is_finite(float value) {
  return (bits_as<uint32_t>(value) & 0x7F800000u) != 0x7F800000u;
}

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kLn2High = 0x1.62e42fefap-1;  // few digits: its product with an integer is exact
constexpr double kLn2Low = 0x1.cf79abc9e3b39p-40;
constexpr double kRound = 0x1.8p52;  // x + kRound holds the integer next to x in its low bits

// e^x = p * 2^n; the low bits of `whole` are n. |x| < 2^40. Relative error of p below 1e-12.
struct Exponential {
  double p;
  uint64_t whole;
};
HOST_DEVICE Exponential split_exp(double x) {
  const double shifted = x * kLog2E + kRound;
  const double n = shifted - kRound;
  const double r = (x - n * kLn2High) - n * kLn2Low;  // |r| < 0.35
  double p = 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return {p, bits_as<uint64_t>(shifted)};
}

// e^x for x <= 0 in units of 2^-44, rounded. A sum of such integers is exact, so its bits do not
// depend on the order of the terms; up to 2^18 terms fit.
constexpr double kUnit = 0x1p-44;
constexpr uint64_t kOne = uint64_t{1} << 44;
HOST_DEVICE uint64_t exp_units(double x) {
  const double clamped = x > -40.0 ? x : -40.0;  // e^-40 is far below half a unit
  const Exponential e = split_exp(clamped < 0.0 ? clamped : 0.0);
  const double scaled = bits_as<double>(bits_as<uint64_t>(e.p) + (e.whole << 52) +
                                        (static_cast<uint64_t>(44) << 52));
  return bits_as<uint64_t>(scaled + 0x1p52) - bits_as<uint64_t>(0x1p52);
}

// e^x for x <= 0; 0 below -700.
HOST_DEVICE double exp_of(double x) {
  if (x < -700.0) return 0.0;
  const Exponential e = split_exp(x);
  return bits_as<double>(bits_as<uint64_t>(e.p) + (e.whole << 52));
}

// log x for a normal x > 0; absolute error below 1e-15 * max(1, |log x|).
HOST_DEVICE double log_of(double x) {
  const auto bits = bits_as<uint64_t>(x);
  auto exponent = static_cast<int32_t>(bits >> 52) - 1023;
  double m = bits_as<double>((bits & 0xFFFFFFFFFFFFFu) | 0x3FF0000000000000u);
  if (m > 1.4142135623730951) {
    m = m * 0.5;
    exponent = exponent + 1;
  }
  const double s = (m - 1.0) / (m + 1.0);  // log m = 2 atanh s, |s| < 0.172
  const double z = s * s;
  double q = 1.0 / 21;
  q = q * z + 1.0 / 19;
  q = q * z + 1.0 / 17;
  q = q * z + 1.0 / 15;
  q = q * z + 1.0 / 13;
  q = q * z + 1.0 / 11;
  q = q * z + 1.0 / 9;
  q = q * z + 1.0 / 7;
  q = q * z + 1.0 / 5;
  q = q * z + 1.0 / 3;
  return exponent * kLn2 + 2.0 * (s + s * (z * q));
}

// float16 bits of a float32, to nearest even; |value| <= 65504.
HOST_DEVICE uint16_t half_bits(float value) {
  const auto bits = bits_as<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude < 0x38800000u) {  // below 2^-14: units of 2^-24
    const float units = bits_as<float>(magnitude) + 0.5f;  // 0.5f has units of 2^-24
    return static_cast<uint16_t>(sign | (bits_as<uint32_t>(units) - 0x3F000000u));
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

// The value of a finite float16. All float16 values of a record are finite.
HOST_DEVICE float half_value(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  const float small = bits_as<float>(rest + (113u << 23)) - 0x1p-14f;
  const uint32_t bits = rest < (1u << 23) ? bits_as<uint32_t>(small) : rest + (112u << 23);
  return bits_as<float>(bits | sign);
}

// float8 e4m3 (no infinities; 0x7F and 0xFF are NaN).
HOST_DEVICE float fp8_value(uint8_t code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t rest = static_cast<uint32_t>(code & 0x7Fu) << 20;
  const uint32_t normal = rest == (0x7Fu << 20) ? 0x7FC00000u : rest + (120u << 23);
  const float small = bits_as<float>(rest + (121u << 23)) - 0x1p-6f;
  const uint32_t bits = rest < (1u << 23) ? bits_as<uint32_t>(small) : normal;
  return bits_as<float>(bits | sign);
}

}  // namespace deit_fast
