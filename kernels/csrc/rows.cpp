// The parallel loops over output rows.
#include "rows.h"

#include <string.h>

#include "isa.h"

namespace remanence {
namespace {

constexpr int64_t kSerialWork = 1 << 15;    // multiply-adds below which starting the threads costs more than it saves

float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Integer arithmetic only: scales of small weights are float16 subnormals, and they must survive flush-to-zero.
float from_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t exponent = half >> 10 & 0x1f;
    const uint32_t mantissa = half & 0x3ff;
    if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * float(mantissa);
    if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
    return from_bits(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
}

void load_scale(const Weight& weight, int64_t row, float* scale) {
    const int64_t begin = row * weight.groups;
    const uint16_t* const halves = static_cast<const uint16_t*>(weight.scale) + begin;
    switch (weight.scale_type) {
        case ScaleType::float32:
            memcpy(scale, static_cast<const float*>(weight.scale) + begin, weight.groups * sizeof(float));
            break;
        case ScaleType::float16:
            for (int64_t g = 0; g < weight.groups; ++g) scale[g] = from_half(halves[g]);
            break;
        case ScaleType::bfloat16:
            for (int64_t g = 0; g < weight.groups; ++g) scale[g] = from_bits(uint32_t(halves[g]) << 16);
            break;
    }
}

void load_zero(const Weight& weight, int64_t row, float* zero) {
    const float middle = float(1 << (weight.bits - 1));
    for (int64_t g = 0; g < weight.groups; ++g)
        zero[g] = weight.zero ? float(weight.zero[row * weight.groups + g]) : middle;
}

// What a thread needs for one row; kept between calls, it grows to the largest K seen.
struct Scratch {
    std::vector<uint8_t> codes;
    std::vector<float> scale, zero, w;
};
thread_local Scratch scratch;

void dequantize_row(const Kernels& kernel, const Weight& weight, int64_t row, float* w) {
    scratch.codes.resize(weight.k);
    scratch.scale.resize(weight.groups);
    scratch.zero.resize(weight.groups);
    const uint8_t* const packed = weight.packed + row * packed_width(weight.k, weight.bits);
    kernel.unpack_row(packed, weight.k, weight.bits, scratch.codes.data());
    load_scale(weight, row, scratch.scale.data());
    load_zero(weight, row, scratch.zero.data());
    kernel.scale_row(scratch.codes.data(), scratch.scale.data(), scratch.zero.data(), weight.groups,
                     weight.k / weight.groups, w);
}

void pack_row(const uint8_t* codes, int64_t k, int bits, uint8_t* packed) {
    memset(packed, 0, packed_width(k, bits));    // the padding is part of the file
    for (int64_t i = 0; i < k; i += 8, packed += bits) {    // eight codes are `bits` bytes
        const int count = k - i < 8 ? int(k - i) : 8;
        uint64_t stream = 0;
        for (int j = 0; j < count; ++j) stream |= uint64_t(codes[i + j]) << (j * bits);
        for (int j = 0; j < (count * bits + 7) / 8; ++j) packed[j] = uint8_t(stream >> (8 * j));
    }
}

}  // namespace

void pack(const uint8_t* codes, uint8_t* packed, int64_t n, int64_t k, int bits, int threads) {
    const int64_t width = packed_width(k, bits);
#pragma omp parallel for schedule(static) num_threads(threads) if (n * k > kSerialWork)
    for (int64_t row = 0; row < n; ++row) pack_row(codes + row * k, k, bits, packed + row * width);
}

void unpack(const uint8_t* packed, uint8_t* codes, int64_t n, int64_t k, int bits, int threads) {
    const Kernels& kernel = kernels();
    const int64_t width = packed_width(k, bits);
#pragma omp parallel for schedule(static) num_threads(threads) if (n * k > kSerialWork)
    for (int64_t row = 0; row < n; ++row) kernel.unpack_row(packed + row * width, k, bits, codes + row * k);
}

void dequantize(const Weight& weight, float* w, int threads) {
    const Kernels& kernel = kernels();
#pragma omp parallel for schedule(static) num_threads(threads) if (weight.n * weight.k > kSerialWork)
    for (int64_t row = 0; row < weight.n; ++row) dequantize_row(kernel, weight, row, w + row * weight.k);
}

void linear(const float* x, const Weight& weight, const float* bias, float* y, int64_t m, int threads) {
    const Kernels& kernel = kernels();
#pragma omp parallel for schedule(static) num_threads(threads) if (weight.n * weight.k * m > kSerialWork)
    for (int64_t row = 0; row < weight.n; ++row) {
        scratch.w.resize(weight.k);
        float* const w = scratch.w.data();
        dequantize_row(kernel, weight, row, w);
        for (int64_t i = 0; i < m; ++i)
            y[i * weight.n + row] = kernel.dot(w, x + i * weight.k, weight.k) + (bias ? bias[row] : 0.0f);
    }
}

}  // namespace remanence
