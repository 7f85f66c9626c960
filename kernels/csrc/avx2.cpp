// AVX2 + FMA kernels. No std:: templates here: an instance compiled with these flags could be picked for everyone.
#include <immintrin.h>

#include "isa.h"
#include "rows_wide.h"

namespace remanence {
namespace {

// Eight codes are `bits` bytes. A 64-bit lane takes them and halves the stream three times, moving the upper half
// up to the next 32, 16 and 8 bits, until every byte holds one code. Holds for 2, 3, 4 and (moving nothing) 8 bits.
inline __m256i halve(__m256i lanes, int shift, uint64_t mask) {
    const __m256i moved = _mm256_sll_epi64(lanes, _mm_cvtsi32_si128(shift));
    return _mm256_and_si256(_mm256_or_si256(lanes, moved), _mm256_set1_epi64x(int64_t(mask)));
}

inline __m256i spread(__m256i lanes, int bits) {
    lanes = halve(lanes, 32 - 4 * bits, ((1ULL << 4 * bits) - 1) * 0x0000000100000001ULL);
    lanes = halve(lanes, 16 - 2 * bits, ((1ULL << 2 * bits) - 1) * 0x0001000100010001ULL);
    return halve(lanes, 8 - bits, ((1ULL << bits) - 1) * 0x0101010101010101ULL);
}

// Puts bytes 0 .. bits-1 in the lower 64-bit lane, the next `bits` in the upper one, zeros above each.
inline __m128i lane_shuffle(int bits) {
    char index[16];
    for (int i = 0; i < 16; ++i) index[i] = i % 8 < bits ? char(i / 8 * bits + i % 8) : char(-128);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(index));
}

void unpack_row(const uint8_t* packed, int64_t k, int bits, uint8_t* codes) {
    const __m256i shuffle = _mm256_broadcastsi128_si256(lane_shuffle(bits));
    const uint8_t* const end = packed + packed_width(k, bits);
    int64_t i = 0;
    for (; i + 32 <= k && end - packed >= 2 * bits + 16; i += 32, packed += 4 * bits) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + 2 * bits));
        const __m256i lanes = _mm256_shuffle_epi8(_mm256_set_m128i(high, low), shuffle);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), spread(lanes, bits));
    }
    scalar::unpack_row(packed, k - i, bits, codes + i);
}

void scale_row(const uint8_t* codes, const float* scale, const float* zero, int64_t groups, int64_t group_size,
               float* w) {
    for (int64_t g = 0; g < groups; ++g, codes += group_size, w += group_size) {
        const __m256 s = _mm256_set1_ps(scale[g]);
        const __m256 z = _mm256_set1_ps(zero[g]);
        int64_t i = 0;
        for (; i + 8 <= group_size; i += 8) {
            const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i));
            const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
            _mm256_storeu_ps(w + i, _mm256_mul_ps(_mm256_sub_ps(code, z), s));
        }
        for (; i < group_size; ++i) w[i] = (float(codes[i]) - zero[g]) * scale[g];
    }
}

// For every byte of a 2:4 bitmask, where each of its eight features finds the two bytes of its half among four halves.
struct Places24 {
    alignas(16) uint8_t of[256][16];
};

constexpr Places24 places24() {
    Places24 places = {};
    for (int marked = 0; marked < 256; ++marked)
        for (int k = 0, at = 0; k < 8; ++k) {
            if (k == 4) at = 2;
            const bool kept = marked >> k & 1 && at < (k < 4 ? 2 : 4);
            places.of[marked][2 * k] = kept ? uint8_t(2 * at) : 0x80;
            places.of[marked][2 * k + 1] = kept ? uint8_t(2 * at + 1) : 0x80;
            at += kept;
        }
    return places;
}

constexpr Places24 kPlaces24 = places24();

struct Vec {
    static constexpr int kLanes = 8;
    using F = __m256;
    using I = __m256i;

    static F zero() { return _mm256_setzero_ps(); }
    static F spread(float value) { return _mm256_set1_ps(value); }
    static F spread(const float* x) { return _mm256_broadcast_ss(x); }
    static I set(int32_t value) { return _mm256_set1_epi32(value); }
    static I broadcast(const int8_t* x) {
        return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(x)));
    }
    static I load(const uint8_t* words) { return _mm256_loadu_si256(reinterpret_cast<const I*>(words)); }
    static void store_words(uint8_t* words, I v) { _mm256_storeu_si256(reinterpret_cast<I*>(words), v); }
    static F load_floats(const float* x) { return _mm256_loadu_ps(x); }
    static void store(float* x, F v) { _mm256_storeu_ps(x, v); }
    static I load_bytes(const uint8_t* x) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
    }
    static F scale(const void* scale, ScaleType type, int64_t at) {
        if (type == ScaleType::float32) return _mm256_loadu_ps(static_cast<const float*>(scale) + at);
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(scale) + at));
        if (type == ScaleType::float16) return _mm256_cvtph_ps(halves);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }

    static I shift_right(I v, int bits) { return _mm256_srli_epi32(v, bits); }
    static I shift_left(I v, int bits) { return _mm256_slli_epi32(v, bits); }
    static I and_(I a, I b) { return _mm256_and_si256(a, b); }
    static I or_(I a, I b) { return _mm256_or_si256(a, b); }
    static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I multiply(I a, I b) { return _mm256_mullo_epi32(a, b); }
    static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static I nearest(F v) { return _mm256_cvtps_epi32(v); }
    static I where_equal(F a, F b, I then, I otherwise) {
        return _mm256_blendv_epi8(otherwise, then, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
    }
    static void store_bytes(int8_t* out, I v) {
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
    }

    static constexpr bool kInPlace = true;
    template <int BITS>
    static constexpr int offset() {
        return 0;
    }
    template <int BITS>
    static F small(I v) {
        return to_float(and_(v, set((1 << BITS) - 1)));
    }

    // Halves are moved as pairs of bytes; places with the highest bit set become zeros.
    template <ScaleType TYPE>
    static F expand24(const uint8_t* values, uint32_t marked) {
        const __m128i places = _mm_load_si128(reinterpret_cast<const __m128i*>(kPlaces24.of[marked]));
        if (TYPE == ScaleType::float32) {    // value i at place 2 i, which the pair (2 i, 2 i + 1) says
            const I spread = _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
            const I places32 = _mm256_cvtepi16_epi32(places);
            const I moved = _mm256_permutevar8x32_epi32(spread, places32);
            return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_srai_epi32(places32, 31), moved));
        }
        const __m128i halves = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)), places);
        if (TYPE == ScaleType::float16) return _mm256_cvtph_ps(halves);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }

    // Products of a byte's pair are summed in 16 bits: 4 * 15 * 128 fits, 2 * 255 * 128 would not.
    static I dot_two(I sum, I codes, I x, I more, I other) {
        const I pairs = _mm256_add_epi16(_mm256_maddubs_epi16(codes, x), _mm256_maddubs_epi16(more, other));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static I dot_wide(I sum, I codes, I x) {
        const I low = _mm256_maddubs_epi16(and_(codes, set(0x0f0f0f0f)), x);
        const I high = _mm256_maddubs_epi16(and_(shift_right(codes, 4), set(0x0f0f0f0f)), x);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
    }
};

// Sixteen registers: whole lines at one row of x, else pairs of vectors.
constexpr int kDirectVectors[] = {8, 2, 2, 2, 2};
constexpr int kPanelVectors = 2;

}  // namespace
}  // namespace remanence

#include "tiles.h"

#include "sparse24_rows.h"

#include "panel_int8.h"

namespace remanence {

const Kernels avx2_kernels = {"avx2",
                              unpack_row,
                              scale_row,
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
                              {direct_int8, place_int8, 8, kAlways, expand_int8, panel_int8, 64, 1024},
                              {direct_float, place_float, 24, 24, expand_float, panel_float, 256, 512},
                              {}};

}  // namespace remanence
