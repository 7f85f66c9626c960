// Portable kernels: the fallback of every architecture, and the tails of the wider ones.
#include "isa.h"

namespace remanence {
namespace {

void unpack_row(const uint8_t* packed, int64_t k, int bits, uint8_t* codes) {
    const uint64_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < k; i += 8, packed += bits) {    // eight codes are `bits` bytes
        const int count = k - i < 8 ? int(k - i) : 8;
        uint64_t stream = 0;
        for (int j = 0; j < (count * bits + 7) / 8; ++j) stream |= uint64_t(packed[j]) << (8 * j);
        for (int j = 0; j < count; ++j) codes[i + j] = uint8_t(stream >> (j * bits) & mask);
    }
}

void scale_row(const uint8_t* codes, const float* scale, const float* zero, int64_t groups, int64_t group_size,
               float* w) {
    for (int64_t g = 0; g < groups; ++g, codes += group_size, w += group_size)
        for (int64_t i = 0; i < group_size; ++i) w[i] = (float(codes[i]) - zero[g]) * scale[g];
}

// Sixteen partial sums: the compiler may use vectors, and the rounding error grows with K/16 instead of K.
float dot(const float* a, const float* b, int64_t k) {
    float sums[16] = {};
    int64_t i = 0;
    for (; i + 16 <= k; i += 16)
        for (int j = 0; j < 16; ++j) sums[j] += a[i + j] * b[i + j];
    for (int j = 0; i + j < k; ++j) sums[j] += a[i + j] * b[i + j];
    for (int width = 8; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
    return sums[0];
}

}  // namespace

const Kernels scalar_kernels = {"scalar", unpack_row, scale_row, dot};

}  // namespace remanence
