// One instruction multiplies four bytes with four and adds them all, in 32 bits.
#include <immintrin.h>

namespace {

struct Dot {
    static __m512i dot_wide(__m512i sum, __m512i codes, __m512i x) { return _mm512_dpbusd_epi32(sum, codes, x); }
    static __m512i dot_two(__m512i sum, __m512i codes, __m512i x, __m512i more, __m512i other) {
        return dot_wide(dot_wide(sum, codes, x), more, other);
    }
};

}  // namespace
