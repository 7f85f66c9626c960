// The table of AVX-512 F, BW, VL, DQ (Skylake): bytes are multiplied as in avx2.cpp.
#include <immintrin.h>

namespace {

struct Dot {
    static __m512i dot_two(__m512i sum, __m512i codes, __m512i x, __m512i more, __m512i other) {
        const __m512i pairs = _mm512_add_epi16(_mm512_maddubs_epi16(codes, x), _mm512_maddubs_epi16(more, other));
        return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
    }
    static __m512i dot_wide(__m512i sum, __m512i codes, __m512i x) {
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i low = _mm512_maddubs_epi16(_mm512_and_si512(codes, nibble), x);
        const __m512i high = _mm512_maddubs_epi16(_mm512_and_si512(_mm512_srli_epi32(codes, 4), nibble), x);
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(low, _mm512_set1_epi16(1)));
        return _mm512_add_epi32(sum, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
    }
};

}  // namespace

#include "avx512.h"

namespace remanence {

const Kernels avx512_kernels = {"avx512",
                                avx512::unpack_row,
                                avx512::scale_row,
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
