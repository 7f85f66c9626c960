// 16 lanes of AVX-512 F, BW, VL, DQ: what its tables share. The file that includes it defines Dot, the products of bytes.
#include <immintrin.h>

#include "isa.h"
#include "rows_wide.h"

namespace remanence {
namespace {

struct Vec : Dot {
    static constexpr int kLanes = 16;
    using F = __m512;
    using I = __m512i;

    static F zero() { return _mm512_setzero_ps(); }
    static F spread(float value) { return _mm512_set1_ps(value); }
    static F spread(const float* x) { return _mm512_set1_ps(*x); }
    static I set(int32_t value) { return _mm512_set1_epi32(value); }
    static I broadcast(const int8_t* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        return _mm512_set1_epi32(four);
    }
    static I load(const uint8_t* words) { return _mm512_loadu_si512(words); }
    static void store_words(uint8_t* words, I v) { _mm512_storeu_si512(words, v); }
    static F load_floats(const float* x) { return _mm512_loadu_ps(x); }
    static void store(float* x, F v) { _mm512_storeu_ps(x, v); }
    static I load_bytes(const uint8_t* x) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    }
    static F scale(const void* scale, ScaleType type, int64_t at) {
        if (type == ScaleType::float32) return _mm512_loadu_ps(static_cast<const float*>(scale) + at);
        const __m256i halves =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(scale) + at));
        if (type == ScaleType::float16) return _mm512_cvtph_ps(halves);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }

    static I shift_right(I v, int bits) { return _mm512_srli_epi32(v, bits); }
    static I shift_left(I v, int bits) { return _mm512_slli_epi32(v, bits); }
    static I and_(I a, I b) { return _mm512_and_si512(a, b); }
    static I or_(I a, I b) { return _mm512_or_si512(a, b); }
    static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I multiply(I a, I b) { return _mm512_mullo_epi32(a, b); }
    static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static I nearest(F v) { return _mm512_cvtps_epi32(v); }
    static I where_equal(F a, F b, I then, I otherwise) {
        return _mm512_mask_mov_epi32(otherwise, _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), then);
    }
    static void store_bytes(int8_t* out, I v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(v));
    }

    template <ScaleType TYPE>
    static F expand24(const uint8_t* values, uint32_t marked) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        __m256 eight;
        if (TYPE == ScaleType::float32)
            eight = _mm256_loadu_ps(reinterpret_cast<const float*>(values));
        else if (TYPE == ScaleType::float16)
            eight = _mm256_cvtph_ps(halves);
        else
            eight = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
        return _mm512_maskz_expand_ps(__mmask16(marked), _mm512_castps256_ps512(eight));
    }

    // A table of the 16 values of 4 bits, less their middle; the upper bits of a lane are not looked at.
    static constexpr bool kInPlace = false;
    template <int BITS>
    static constexpr int offset() {
        return BITS == 2 || BITS == 4 ? 1 << (BITS - 1) : 0;
    }
    template <int BITS>
    static F small(I v) {
        const F table = BITS == 4 ? _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)
                                  : _mm512_setr_ps(-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1);
        return _mm512_permutexvar_ps(v, table);
    }
};

constexpr int kDirectVectors[] = {4, 4, 4, 4, 4};
constexpr int kPanelVectors = 4;

}  // namespace
}  // namespace remanence

#include "tiles.h"

#include "sparse24_rows.h"
