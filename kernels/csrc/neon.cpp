// The table of ARMv8.2 with products of four bytes (dotprod).
#include <arm_neon.h>

#include "halves.h"
#include "isa.h"
#include "rows_wide.h"

namespace remanence {
namespace {

struct Vec {
    static constexpr int kLanes = 4;
    using F = float32x4_t;
    using I = int32x4_t;

    static F zero() { return vdupq_n_f32(0); }
    static F spread(float value) { return vdupq_n_f32(value); }
    static F spread(const float* x) { return vld1q_dup_f32(x); }
    static I set(int32_t value) { return vdupq_n_s32(value); }
    static I broadcast(const int8_t* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        return vdupq_n_s32(four);
    }
    static I load(const uint8_t* words) { return vreinterpretq_s32_u8(vld1q_u8(words)); }
    static void store_words(uint8_t* words, I v) { vst1q_u8(words, vreinterpretq_u8_s32(v)); }
    static F load_floats(const float* x) { return vld1q_f32(x); }
    static void store(float* x, F v) { vst1q_f32(x, v); }
    static I load_bytes(const uint8_t* x) {
        uint32_t four;
        __builtin_memcpy(&four, x, 4);
        return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
    }
    static F scale(const void* scale, ScaleType type, int64_t at) {
        if (type == ScaleType::float32) return vld1q_f32(static_cast<const float*>(scale) + at);
        const uint16x4_t halves = vld1_u16(static_cast<const uint16_t*>(scale) + at);
        if (type == ScaleType::float16) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
        return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
    }

    static I shift_right(I v, int bits) {
        return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v), vdupq_n_s32(-bits)));
    }
    static I shift_left(I v, int bits) { return vshlq_s32(v, vdupq_n_s32(bits)); }
    static I and_(I a, I b) { return vandq_s32(a, b); }
    static I or_(I a, I b) { return vorrq_s32(a, b); }
    static I sub(I a, I b) { return vsubq_s32(a, b); }
    static I multiply(I a, I b) { return vmulq_s32(a, b); }
    static F to_float(I v) { return vcvtq_f32_s32(v); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    static F min(F a, F b) { return vminq_f32(a, b); }
    static F max(F a, F b) { return vmaxq_f32(a, b); }
    static I nearest(F v) { return vcvtnq_s32_f32(v); }
    static I where_equal(F a, F b, I then, I otherwise) { return vbslq_s32(vceqq_f32(a, b), then, otherwise); }
    static void store_bytes(int8_t* out, I v) {
        const int16x4_t words = vqmovn_s32(v);
        const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
        vst1_lane_s32(reinterpret_cast<int32_t*>(out), vreinterpret_s32_s8(bytes), 0);
    }

    static constexpr bool kInPlace = false;
    template <int BITS>
    static constexpr int offset() {
        return 0;
    }
    template <int BITS>
    static F small(I v) {
        return to_float(and_(v, set((1 << BITS) - 1)));
    }

    template <ScaleType TYPE>
    static F expand24(const uint8_t* values, uint32_t marked) {
        float out[kLanes] = {};
        place24(values, TYPE, kLanes, marked, out);
        return load_floats(out);
    }

    static int8x16_t bytes(I v) { return vreinterpretq_s8_s32(v); }
    static I dot_two(I sum, I codes, I x, I more, I other) {
        return vdotq_s32(vdotq_s32(sum, bytes(codes), bytes(x)), bytes(more), bytes(other));
    }
    // Codes above 127 are no signed bytes: code - 128 is, and 128 x is added as 64 x twice.
    static I dot_wide(I sum, I codes, I x) {
        const int8x16_t half = vdupq_n_s8(64), features = bytes(x);
        sum = vdotq_s32(sum, bytes(veorq_s32(codes, set(int32_t(0x80808080)))), features);
        return vdotq_s32(vdotq_s32(sum, half, features), half, features);
    }
};

// Thirty-two registers.
constexpr int kDirectVectors[] = {8, 4, 4, 4, 4};
constexpr int kPanelVectors = 4;

}  // namespace
}  // namespace remanence

#include "tiles.h"

#include "sparse24_rows.h"

namespace remanence {

const Kernels neon_kernels = {"neon",
                              scalar::unpack_row,
                              scalar::scale_row,
                              load_row,
                              store_row,
                              quantize_row,
                              hadamard_row,
                              multiply24,
                              expand24,
                              read_bytes,
                              peak_float,
                              peak_int8,
                              nullptr,
                              kLanes,
                              {direct_int8, place_int8, kAlways, kAlways, nullptr, nullptr, 0, 0},
                              {direct_float, place_float, kAlways, kAlways, expand_float, panel_float, 256, 512},
                              {}};

}  // namespace remanence
