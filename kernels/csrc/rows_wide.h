// Functions on rows of the stored layout that tables of several instruction sets share.
#pragma once

#include <stdint.h>

namespace remanence {

namespace avx512 {
void unpack_row(const uint8_t* packed, int64_t k, int bits, uint8_t* codes);
void scale_row(const uint8_t* codes, const float* scale, const float* zero, int64_t groups, int64_t group_size, float* w);
}  // namespace avx512

namespace scalar {
void unpack_row(const uint8_t* packed, int64_t k, int bits, uint8_t* codes);
void scale_row(const uint8_t* codes, const float* scale, const float* zero, int64_t groups, int64_t group_size, float* w);
}  // namespace scalar

}  // namespace remanence
