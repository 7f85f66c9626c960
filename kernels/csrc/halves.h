// Numbers of 16 bits, and of 32, to float32 and back.
#pragma once

#include <stdint.h>
#include <string.h>

#include "rows.h"

namespace remanence {

// static: each file keeps its own copy, compiled for its own instruction set.
static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Integer arithmetic only: scales of small weights are float16 subnormals, and they must survive flush-to-zero.
static inline float from_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t exponent = half >> 10 & 0x1f;
    const uint32_t mantissa = half & 0x3ff;
    if (exponent == 0) return (sign ? -0x1p-24f : 0x1p-24f) * float(mantissa);
    if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13);
    return from_bits(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
}

static inline float from_bfloat(uint16_t value) { return from_bits(uint32_t(value) << 16); }

// To the nearest, ties to even, as torch rounds; a NaN stays one.
static inline uint16_t to_bfloat(float value) {
    const uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t to_half(float value) {
    const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);    // 65520 and more round to infinity
    if (magnitude < 0x38800000) {    // subnormal: in units of 2^-24; adding 1.5 * 2^23 of them rounds
        const float units = from_bits(magnitude) * 0x1p24f;
        return uint16_t(sign | (to_bits(units + 12582912.0f) & 0x7ff));
    }
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

static inline float load_scale_at(const void* scale, ScaleType type, int64_t at) {
    switch (type) {
        case ScaleType::float16: return from_half(static_cast<const uint16_t*>(scale)[at]);
        case ScaleType::bfloat16: return from_bfloat(static_cast<const uint16_t*>(scale)[at]);
        default: return static_cast<const float*>(scale)[at];
    }
}

// The values of 2:4 weights at the features that `marked` has bits for, two at most of every four of `lanes` features.
static inline void place24(const uint8_t* values, ScaleType type, int lanes, uint32_t marked, float* out) {
    for (int k = 0; k < lanes; k += 4) {
        uint32_t four = marked >> k & 15;
        for (int at = k / 2; four && at < k / 2 + 2; ++at, four &= four - 1)
            out[k + __builtin_ctz(four)] = load_scale_at(values, type, at);
    }
}

}  // namespace remanence
