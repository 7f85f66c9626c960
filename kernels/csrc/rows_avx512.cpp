// AVX-512 F, BW, VL, DQ: rows of the stored layout; the tails are masked. No std:: templates here, as in avx2.cpp.
#include <immintrin.h>

#include "isa.h"
#include "rows_wide.h"

namespace remanence::avx512 {
namespace {

// As in avx2.cpp: eight codes in a 64-bit lane, halved three times until every byte holds one code.
inline __m512i halve(__m512i lanes, int shift, uint64_t mask) {
    const __m512i moved = _mm512_sll_epi64(lanes, _mm_cvtsi32_si128(shift));
    return _mm512_and_si512(_mm512_or_si512(lanes, moved), _mm512_set1_epi64(int64_t(mask)));
}

inline __m512i spread(__m512i lanes, int bits) {
    lanes = halve(lanes, 32 - 4 * bits, ((1ULL << 4 * bits) - 1) * 0x0000000100000001ULL);
    lanes = halve(lanes, 16 - 2 * bits, ((1ULL << 2 * bits) - 1) * 0x0001000100010001ULL);
    return halve(lanes, 8 - bits, ((1ULL << bits) - 1) * 0x0101010101010101ULL);
}

inline __m128i load16(const uint8_t* bytes) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)); }

// Puts bytes 0 .. bits-1 in the lower 64-bit lane, the next `bits` in the upper one, zeros above each.
inline __m128i lane_shuffle(int bits) {
    uint8_t index[16];
    for (int i = 0; i < 16; ++i) index[i] = i % 8 < bits ? uint8_t(i / 8 * bits + i % 8) : uint8_t(128);
    return load16(index);
}

// Bytes of 64 codes, two lanes of 8 codes from each load: 6 * bits + 16 bytes are read, 8 * bits used.
inline __m512i load_lanes(const uint8_t* packed, int bits) {
    __m512i lanes = _mm512_castsi128_si512(load16(packed));
    lanes = _mm512_inserti64x2(lanes, load16(packed + 2 * bits), 1);
    lanes = _mm512_inserti64x2(lanes, load16(packed + 4 * bits), 2);
    return _mm512_inserti64x2(lanes, load16(packed + 6 * bits), 3);
}

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }

}  // namespace

void unpack_row(const uint8_t* packed, int64_t k, int bits, uint8_t* codes) {
    const __m512i shuffle = _mm512_broadcast_i64x2(lane_shuffle(bits));
    const uint8_t* const end = packed + packed_width(k, bits);
    int64_t i = 0;
    for (; i + 64 <= k && end - packed >= 6 * bits + 16; i += 64, packed += 8 * bits) {
        const __m512i lanes = _mm512_shuffle_epi8(load_lanes(packed, bits), shuffle);
        _mm512_storeu_si512(codes + i, spread(lanes, bits));
    }
    scalar::unpack_row(packed, k - i, bits, codes + i);
}

void scale_row(const uint8_t* codes, const float* scale, const float* zero, int64_t groups, int64_t group_size,
               float* w) {
    for (int64_t g = 0; g < groups; ++g, codes += group_size, w += group_size) {
        const __m512 s = _mm512_set1_ps(scale[g]);
        const __m512 z = _mm512_set1_ps(zero[g]);
        for (int64_t i = 0; i < group_size; i += 16) {
            const __mmask16 mask = first(group_size - i);
            const __m128i bytes = _mm_maskz_loadu_epi8(mask, codes + i);
            const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
            _mm512_mask_storeu_ps(w + i, mask, _mm512_mul_ps(_mm512_sub_ps(code, z), s));
        }
    }
}

}  // namespace remanence::avx512
