// Two passes, each a sum of integer weights times bytes: along x, rounded to bytes, then along y.
// Pillow computes one pixel at a time. Here a lane is a row (along x) or a value of a row (along
// y): loops of a fixed length over adjacent bytes, which compilers vectorise. Integer sums do not
// depend on their order, so the bytes are the same.
#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

// Compiles the loops once for each vector width; the loader selects one.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define DEIT_FAST_VECTOR_WIDTHS __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define DEIT_FAST_VECTOR_WIDTHS
#endif

namespace deit_fast {
namespace {

constexpr int kFractionBits = 22;  // of a weight; the sums fit int32 for any image size
constexpr int kRows = 16;          // in a tile of the pass along x
constexpr int kChannels = 3;
constexpr int kLanes = kRows * kChannels;
constexpr int kValues = 64;  // of a row that the pass along y sums together

// Keys' cubic with a = -0.5.
double cubic(double t) {
  constexpr double a = -0.5;
  t = std::fabs(t);
  if (t < 1.0) return ((a + 2.0) * t - (a + 3.0)) * t * t + 1;
  if (t < 2.0) return (((t - 5.0) * t + 8.0) * t - 4.0) * a;
  return 0.0;
}

// For every output index along one axis, the inputs [first, first + count) and their weights.
struct Axis {
  int64_t stride = 0;  // between the weights of two indices
  std::vector<int64_t> first, count;
  std::vector<int32_t> weights;

  Axis(int64_t in, int64_t out) : first(out), count(out) {
    const double scale = double(in) / double(out);
    const double widening = std::max(scale, 1.0);  // antialias: the filter covers its input
    const double support = 2.0 * widening;
    const double narrowing = 1.0 / widening;
    stride = int64_t(std::ceil(support)) * 2 + 1;
    weights.resize(size_t(out * stride));
    std::vector<double> exact(static_cast<size_t>(stride));
    for (int64_t index = 0; index < out; ++index) {
      const double centre = (double(index) + 0.5) * scale;
      const int64_t begin = std::max<int64_t>(int64_t(centre - support + 0.5), 0);
      const int64_t end = std::min<int64_t>(int64_t(centre + support + 0.5), in);
      double sum = 0.0;
      for (int64_t j = begin; j < end; ++j) {
        const double weight = cubic((double(j) - centre + 0.5) * narrowing);
        exact[size_t(j - begin)] = weight;
        sum += weight;
      }
      for (int64_t j = 0; j < end - begin; ++j) {
        double weight = exact[size_t(j)];
        if (sum != 0.0) weight /= sum;
        weight *= double(1 << kFractionBits);
        weights[size_t(index * stride + j)] = int32_t(weight < 0 ? weight - 0.5 : weight + 0.5);
      }
      first[size_t(index)] = begin;
      count[size_t(index)] = end - begin;
    }
  }
};

inline uint8_t to_byte(int32_t sum) {
  return uint8_t(std::min(std::max(sum >> kFractionBits, 0), 255));
}

// Resizes up to kRows rows along x. `tile` and `done` are [x * 3 + channel][row].
DEIT_FAST_VECTOR_WIDTHS
void resize_rows(const uint8_t* pixels, int64_t row_bytes, int64_t rows, int64_t width,
                 const Axis& axis, uint8_t* tile, uint8_t* done, uint8_t* out) {
  const int64_t out_width = int64_t(axis.first.size());
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = pixels + r * row_bytes;
    for (int64_t i = 0; i < width * kChannels; ++i) tile[i * kRows + r] = row[i];
  }
  for (int64_t x = 0; x < out_width; ++x) {
    int32_t sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = 1 << (kFractionBits - 1);
    const uint8_t* from = tile + axis.first[size_t(x)] * kLanes;
    const int32_t* weights = axis.weights.data() + x * axis.stride;
    for (int64_t j = 0; j < axis.count[size_t(x)]; ++j, from += kLanes) {
      const int32_t weight = weights[j];
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += weight * int32_t(from[lane]);
    }
    for (int lane = 0; lane < kLanes; ++lane) done[x * kLanes + lane] = to_byte(sums[lane]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* row = out + r * out_width * kChannels;
    for (int64_t i = 0; i < out_width * kChannels; ++i) row[i] = done[i * kRows + r];
  }
}

// Sums one output row from the rows of `middle`, `values` bytes each.
DEIT_FAST_VECTOR_WIDTHS
void sum_rows(const uint8_t* middle, int64_t values, const int32_t* weights, int64_t count,
              uint8_t* out) {
  int64_t at = 0;
  for (; at + kValues <= values; at += kValues) {
    int32_t sums[kValues];
    for (int lane = 0; lane < kValues; ++lane) sums[lane] = 1 << (kFractionBits - 1);
    const uint8_t* from = middle + at;
    for (int64_t j = 0; j < count; ++j, from += values) {
      const int32_t weight = weights[j];
      for (int lane = 0; lane < kValues; ++lane) sums[lane] += weight * int32_t(from[lane]);
    }
    for (int lane = 0; lane < kValues; ++lane) out[at + lane] = to_byte(sums[lane]);
  }
  for (; at < values; ++at) {
    int32_t sum = 1 << (kFractionBits - 1);
    for (int64_t j = 0; j < count; ++j) sum += weights[j] * int32_t(middle[j * values + at]);
    out[at] = to_byte(sum);
  }
}

}  // namespace

void crop_resize(const uint8_t* pixels, int64_t row_bytes, int64_t left, int64_t top,
                 int64_t width, int64_t height, int64_t out_width, int64_t out_height,
                 uint8_t* out) {
  const uint8_t* from = pixels + top * row_bytes + left * kChannels;
  const int64_t values = out_width * kChannels;

  // Along x: straight to `out` if no pass along y follows.
  std::unique_ptr<uint8_t[]> middle;
  uint8_t* rows = out;
  if (height != out_height) {
    middle.reset(new uint8_t[size_t(height * values)]);
    rows = middle.get();
  }
  if (width == out_width) {
    for (int64_t y = 0; y < height; ++y)
      std::memcpy(rows + y * values, from + y * row_bytes, size_t(values));
  } else {
    const Axis axis(width, out_width);
    const std::unique_ptr<uint8_t[]> tile(new uint8_t[size_t(width * kLanes)]());
    const std::unique_ptr<uint8_t[]> done(new uint8_t[size_t(out_width * kLanes)]);
    for (int64_t y = 0; y < height; y += kRows)
      resize_rows(from + y * row_bytes, row_bytes, std::min<int64_t>(kRows, height - y), width,
                  axis, tile.get(), done.get(), rows + y * values);
  }
  if (height == out_height) return;

  const Axis axis(height, out_height);
  for (int64_t y = 0; y < out_height; ++y)
    sum_rows(rows + axis.first[size_t(y)] * values, values, axis.weights.data() + y * axis.stride,
             axis.count[size_t(y)], out + y * values);
}

}  // namespace deit_fast
