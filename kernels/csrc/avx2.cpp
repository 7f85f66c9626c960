// AVX2 + FMA kernels. No std:: templates here: an instance compiled with these flags could be picked for everyone.
#include <immintrin.h>

#include "isa.h"

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
    scalar_kernels.unpack_row(packed, k - i, bits, codes + i);
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

inline float sum_lanes(__m256 v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// Four sums in flight hide the latency of the FMA.
float dot(const float* a, const float* b, int64_t k) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t i = 0;
    for (; i + 32 <= k; i += 32)
        for (int j = 0; j < 4; ++j)
            sums[j] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * j), _mm256_loadu_ps(b + i + 8 * j), sums[j]);
    for (; i + 8 <= k; i += 8) sums[0] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sums[0]);
    float total = sum_lanes(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    for (; i < k; ++i) total += a[i] * b[i];
    return total;
}

}  // namespace

const Kernels avx2_kernels = {"avx2", unpack_row, scale_row, dot};

}  // namespace remanence
