// The table of AVX-512 with VNNI and BF16 (Zen 4, Cooper Lake, Sapphire Rapids): x in bfloat16 is multiplied as it is.
//
// An integer below 128 becomes a bfloat16 without a conversion: it is put into the lowest bits of 128's mantissa, which
// gives 128 + code. What is too much, 128 times the sum of x, is taken off once a group. At 8 bits the code's upper four
// bits do the same with 2048 + 16 * high.
#include "vnni.h"

#include "avx512.h"

namespace remanence {
namespace {

using B = __m512bh;

inline I magic(I bits, int32_t mask, int32_t base) {
    return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(mask), _mm512_set1_epi32(base), 0xea);    // bits & mask | base
}

inline F dot_bf16(F sum, I weights, I x) { return _mm512_dpbf16_ps(sum, B(weights), B(x)); }

// Codes 0 and 2 of quad q (half 0), or 1 and 3 (half 1), as pairs of bfloat16 numbers 128 + code.
template <int BITS>
inline I pair(const I* word, int q, int half) {
    if constexpr (BITS == 3) return magic(Vec::shift_right(quad<3>(word, q), 8 * half), 0x00070007, 0x43004300);
    return magic(Vec::shift_right(word[0], BITS * q + 8 * half), BITS == 2 ? 0x00030003 : 0x000f000f, 0x43004300);
}

template <int BITS, int R, int J>
void direct_bf16_lanes(const Block& block, int lane, const uint16_t* x, const float* sums, float* y) {
    using S = Step<BITS>;
    constexpr float offset = BITS == 8 ? 128 + 2048 : 128;
    constexpr int C = R * J < 8 ? 2 : 1;    // two sums where the products would wait for each other
    const uint8_t* words = block.words + 4 * lane;
    F total[R][J];
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int j = 0; j < J; ++j) total[i][j] = Vec::zero();
    for (int64_t p = 0; p < block.groups * block.runs; ++p, sums += R) {
        const int64_t g = p / block.runs, steps = steps_of(block, p % block.runs);
        F sum[R][J][C];
        UNROLL for (int i = 0; i < R; ++i)
            UNROLL for (int j = 0; j < J; ++j)
                UNROLL for (int c = 0; c < C; ++c) sum[i][j][c] = Vec::zero();
        for (int64_t s = 0; s < steps; ++s, words += S::lines * kLineBytes, x += 4 * S::quads * R) {
            I word[J][S::lines];
            UNROLL for (int j = 0; j < J; ++j) {
                load_words<BITS>(words + 4 * kLanes * j, word[j]);
                prefetch<BITS>(words + 4 * kLanes * j, 0);
            }
            UNROLL for (int q = 0; q < S::quads; ++q)
                UNROLL for (int half = 0; half < 2; ++half) {
                    I low[J], high[J];
                    UNROLL for (int j = 0; j < J; ++j) {
                        low[j] = pair<BITS>(word[j], q, half);
                        if (BITS == 8) high[j] = magic(Vec::shift_right(word[j][0], 8 * half + 4), 0x000f000f, 0x45004500);
                    }
                    UNROLL for (int i = 0; i < R; ++i) {
                        const I two = Vec::broadcast(reinterpret_cast<const int8_t*>(x + 4 * (q * R + i) + 2 * half));
                        UNROLL for (int j = 0; j < J; ++j) {
                            F& to = sum[i][j][C == 2 ? half : 0];
                            to = dot_bf16(to, low[j], two);
                            if (BITS == 8) to = dot_bf16(to, high[j], two);
                        }
                    }
                }
        }
        UNROLL for (int j = 0; j < J; ++j) {
            const int64_t at = g * kBlockRows + lane + kLanes * j;
            const F scale = Vec::scale(block.scale, block.scale_type, at);
            const F zero = block.zero ? Vec::to_float(Vec::load_bytes(block.zero + at)) : Vec::spread(float(S::middle));
            const F off = Vec::sub(Vec::spread(-offset), zero);
            UNROLL for (int i = 0; i < R; ++i) {
                F all = sum[i][j][0];
                if (C == 2) all = Vec::add(all, sum[i][j][C - 1]);
                all = Vec::fma(off, Vec::spread(sums[i]), all);
                total[i][j] = Vec::fma(all, scale, total[i][j]);
            }
        }
    }
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int j = 0; j < J; ++j) Vec::store(y + i * kBlockRows + lane + kLanes * j, total[i][j]);
}

template <int BITS, int R>
void direct_bf16_rows(const Block& block, const uint16_t* x, const float* sums, float* y) {
    direct_bf16_lanes<BITS, R, 4>(block, 0, x, sums, y);
}

void direct_bf16(const Block& block, int rows, const uint16_t* x, const float* sums, float* y) {
    BY_DIRECT_ROWS(direct_bf16_rows, (block, x, sums, y))
}

// An integer of at most 255 either way is a bfloat16 exactly: its float32 without the lower half.
inline I halves(F even, F odd) {
    return magic(_mm512_castps_si512(odd), int32_t(0xffff0000), 0) | Vec::shift_right(_mm512_castps_si512(even), 16);
}

// panel [K/4][2][64][2] bfloat16: a quad's features 0 and 2, then 1 and 3. At 8 bits code - 128, else 128 + code.
template <int BITS>
void expand_bf16_bits(const Block& block, int64_t first, int64_t last, uint8_t* panel) {
    using S = Step<BITS>;
    const int64_t steps = (last - first) * block.steps;
    const uint8_t* words = block.words + first * block.steps * S::lines * kLineBytes;
    for (int64_t s = 0; s < steps; ++s, words += S::lines * kLineBytes)
        for (int at = 0; at < kLineBytes; at += 4 * kLanes) {
            I word[S::lines];
            load_words<BITS>(words + at, word);
            prefetch<BITS>(words + at, 0);
            UNROLL for (int q = 0; q < S::quads; ++q)
                UNROLL for (int half = 0; half < 2; ++half) {
                    I two;
                    if constexpr (BITS == 8)
                        two = halves(Vec::sub(number<8>(word, q, half), Vec::spread(128.0f)),
                                     Vec::sub(number<8>(word, q, half + 2), Vec::spread(128.0f)));
                    else
                        two = pair<BITS>(word, q, half);
                    Vec::store_words(panel + ((s * S::quads + q) * 2 + half) * kLineBytes + at, two);
                }
        }
}

void expand_bf16(const Block& block, int64_t first, int64_t last, uint8_t* panel) {
    BY_BITS(expand_bf16_bits, > (block, first, last, panel))
}

template <int R>
void panel_bf16_rows(const Block& block, const uint8_t* panel, int64_t first, int64_t last, const uint16_t* x,
                     const float* sums, float* y) {
    constexpr int J = kBlockRows / kLanes;
    const float offset = block.bits == 8 ? -128 : 128;
    for (int64_t p = first * block.runs; p < last * block.runs; ++p, sums += R) {
        const int64_t g = p / block.runs, quads = steps_of(block, p % block.runs) * step_quads(block);
        F sum[R][J];
        UNROLL for (int i = 0; i < R; ++i)
            UNROLL for (int j = 0; j < J; ++j) sum[i][j] = Vec::zero();
        for (int64_t q = 0; q < quads; ++q, x += 4 * R)
            UNROLL for (int half = 0; half < 2; ++half, panel += kLineBytes) {
                I w[J];
                UNROLL for (int j = 0; j < J; ++j) w[j] = Vec::load(panel + 4 * kLanes * j);
                UNROLL for (int i = 0; i < R; ++i) {
                    const I two = Vec::broadcast(reinterpret_cast<const int8_t*>(x + 4 * i + 2 * half));
                    UNROLL for (int j = 0; j < J; ++j) sum[i][j] = dot_bf16(sum[i][j], w[j], two);
                }
            }
        UNROLL for (int j = 0; j < J; ++j) {
            const int64_t at = g * kBlockRows + kLanes * j;
            const F scale = Vec::scale(block.scale, block.scale_type, at);
            const F zero = block.zero ? Vec::to_float(Vec::load_bytes(block.zero + at))
                                      : Vec::spread(float(1 << (block.bits - 1)));
            const F off = Vec::sub(Vec::spread(-offset), zero);
            UNROLL for (int i = 0; i < R; ++i) {
                float* const out = y + i * kBlockRows + kLanes * j;
                const F all = Vec::fma(off, Vec::spread(sums[i]), sum[i][j]);
                Vec::store(out, Vec::fma(all, scale, Vec::load_floats(out)));
            }
        }
    }
}

void panel_bf16(const Block& block, const uint8_t* panel, int64_t first, int64_t last, int rows, const uint16_t* x,
                const float* sums, float* y) {
    BY_PANEL_ROWS(panel_bf16_rows, (block, panel, first, last, x, sums, y))
}

float peak_bf16(int64_t n) {
    const int8_t four[4] = {seed[0], seed[1], seed[2], seed[3]};
    const I two = Vec::broadcast(four);
    F sum[kPeakVectors];
    UNROLL for (int j = 0; j < kPeakVectors; ++j) sum[j] = Vec::spread(float(j));
    for (int64_t i = 0; i < n; ++i) UNROLL for (int j = 0; j < kPeakVectors; ++j) sum[j] = dot_bf16(sum[j], two, I(sum[j]));
    float total = 0, lanes[kLanes];
    for (int j = 0; j < kPeakVectors; ++j) {
        Vec::store(lanes, sum[j]);
        total += lanes[0];
    }
    return total;
}

float place_bf16(const uint16_t* from, int64_t count, int64_t height, uint16_t* tile) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4, tile += 4 * height) {
        uint64_t quad;
        __builtin_memcpy(&quad, from + i, sizeof quad);
        quad = (quad & 0xffff00000000ffff) | (quad >> 16 & 0xffff0000) | (quad & 0xffff0000) << 16;
        __builtin_memcpy(tile, &quad, sizeof quad);
    }
    for (int64_t j = 0; i + j < count; ++j) tile[j == 1 ? 2 : j == 2 ? 1 : j] = from[i + j];
    // The products take a subnormal number as zero; were it in the sum, what is taken off would not have been put on.
    return sum_of(count, [from](int64_t i) { return from[i] & 0x7f80 ? from_bfloat(from[i]) : 0.0f; });
}

}  // namespace

const Kernels avx512_bf16_kernels = {"avx512_bf16",
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
                                     peak_bf16,
                                     kLanes,
                                     {direct_int8, place_int8, kAlways, kAlways, nullptr, nullptr, 0, 0},
                                     {direct_float, place_float, kAlways, kAlways, expand_float, panel_float, 256, 512},
                                     {direct_bf16, place_bf16, kAlways, 16, expand_bf16, panel_bf16, 128, 512}};

}  // namespace remanence
