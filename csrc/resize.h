// Crop and bicubic resize of an RGB image, byte for byte as Pillow 11 to 12.3.
#pragma once

#include <cstdint>

namespace deit_fast {

// Resizes the box (left, top, width, height) of an image whose rows are `row_bytes` apart, three
// bytes a pixel, to [out_height, out_width, 3]. The caller has checked that the box lies within the
// image and that no side is 0. Reads nothing outside the box.
void crop_resize(const uint8_t* pixels, int64_t row_bytes, int64_t left, int64_t top,
                 int64_t width, int64_t height, int64_t out_width, int64_t out_height,
                 uint8_t* out);

}  // namespace deit_fast
