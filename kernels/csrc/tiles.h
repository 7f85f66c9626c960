// The arithmetic on blocks, written once: included by the file of each instruction set after it has defined
//   struct Vec       F float32 and I int32 vectors of kLanes lanes, and what is done with them
//   kDirectVectors   vectors of a line that `direct` works on at once with 1, 2, 3, 4 rows of x: what registers allow
//   kPanelVectors    the same for `panel`
// Everything here is in an anonymous namespace and free of std::, so each file keeps code of its own instruction set.
#include "isa.h"

#define UNROLL _Pragma("GCC unroll 64")

namespace remanence {
namespace {

using F = Vec::F;
using I = Vec::I;
constexpr int kLanes = Vec::kLanes;
constexpr int64_t kAhead = 4096;    // bytes: measured best of 1, 2, 4, 8 KiB; the hardware stops at the page

template <int BITS>
struct Step {
    static constexpr int lines = BITS == 3 ? 3 : 1;
    static constexpr int quads = BITS == 3 ? 8 : 8 / BITS;
    static constexpr int middle = 1 << (BITS - 1);
};

template <int BITS>
inline void load_words(const uint8_t* words, I* word) {
    UNROLL for (int line = 0; line < Step<BITS>::lines; ++line) word[line] = Vec::load(words + line * kLineBytes);
}

// What will be read in kAhead bytes; once for each cache line, `at` bytes into it. Inlined before all else: GCC takes a
// function that only prefetches for one without effect, and leaves out its calls.
template <int BITS>
[[gnu::always_inline]] inline void prefetch(const uint8_t* words, int at) {
    if (at % 64 == 0)
        UNROLL for (int line = 0; line < Step<BITS>::lines; ++line) __builtin_prefetch(words + line * kLineBytes + kAhead);
}

// Four neighbouring codes of each row, a byte each.
template <int BITS>
inline I quad(const I* word, int q) {
    if constexpr (BITS == 8) return word[0];
    if constexpr (BITS == 3) {
        const I low = Vec::and_(Vec::shift_right(word[q / 4], 2 * (q % 4)), Vec::set(0x03030303));
        const I high = Vec::and_(Vec::shift_right(word[2], q), Vec::set(0x01010101));
        return Vec::or_(low, Vec::shift_left(high, 2));
    }
    return Vec::and_(Vec::shift_right(word[0], BITS * q), Vec::set(BITS == 4 ? 0x0f0f0f0f : 0x03030303));
}

// Code number t of quad q, less Vec::offset<BITS>().
template <int BITS>
inline F number(const I* word, int q, int t) {
    if constexpr (BITS == 2 || BITS == 4) return Vec::small<BITS>(Vec::shift_right(word[0], BITS * q + 8 * t));
    return Vec::to_float(Vec::and_(Vec::shift_right(quad<BITS>(word, q), 8 * t), Vec::set(0xff)));
}

// The same where one row of x alone is multiplied: the code as it lies in its word, 2^place times as large, unless it lies
// uppermost. A shift for each vector less, for a product for each x more.
template <int BITS>
constexpr int place_of(int q, int t) {
    const int place = (BITS == 8 ? 0 : BITS * q) + 8 * t;
    return place + BITS == 32 ? 0 : place;
}

template <int BITS>
inline F number_in_place(const I* word, int q, int t) {
    const int place = place_of<BITS>(q, t);
    if (place == 0 && q + t > 0) return Vec::to_float(Vec::shift_right(word[0], 32 - BITS));
    return Vec::to_float(Vec::and_(word[0], Vec::set(((1 << BITS) - 1) << place)));
}

// Steps of run r of a group.
inline int64_t steps_of(const Block& block, int64_t r) {
    return r + 1 < block.runs ? block.run_steps : block.steps - r * block.run_steps;
}

// Rows of x against the packed words of `J` vectors of rows of the weight, from row `lane` on.
template <int BITS, int R, int J>
void direct_int8_lanes(const Block& block, int lane, const int8_t* x, const int32_t* sums, float* y) {
    using S = Step<BITS>;
    const uint8_t* words = block.words + 4 * lane;
    F total[R][J];
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int j = 0; j < J; ++j) total[i][j] = Vec::zero();
    for (int64_t p = 0; p < block.groups * block.runs; ++p, sums += R) {
        const int64_t g = p / block.runs, steps = steps_of(block, p % block.runs);
        I sum[R][J];
        UNROLL for (int i = 0; i < R; ++i)
            UNROLL for (int j = 0; j < J; ++j) sum[i][j] = Vec::set(block.zero ? 0 : -S::middle * sums[i]);
        for (int64_t s = 0; s < steps; ++s, words += S::lines * kLineBytes, x += 4 * S::quads * R) {
            I word[J][S::lines];
            UNROLL for (int j = 0; j < J; ++j) {
                load_words<BITS>(words + 4 * kLanes * j, word[j]);
                prefetch<BITS>(words + 4 * kLanes * j, 4 * kLanes * j);
            }
            if constexpr (BITS == 8) {
                UNROLL for (int i = 0; i < R; ++i) {
                    const I features = Vec::broadcast(x + 4 * i);
                    UNROLL for (int j = 0; j < J; ++j) sum[i][j] = Vec::dot_wide(sum[i][j], word[j][0], features);
                }
            } else {
                UNROLL for (int q = 0; q < S::quads; q += 2) {
                    I even[J], odd[J];
                    UNROLL for (int j = 0; j < J; ++j) even[j] = quad<BITS>(word[j], q), odd[j] = quad<BITS>(word[j], q + 1);
                    UNROLL for (int i = 0; i < R; ++i) {
                        const I first = Vec::broadcast(x + 4 * (q * R + i));
                        const I second = Vec::broadcast(x + 4 * ((q + 1) * R + i));
                        UNROLL for (int j = 0; j < J; ++j)
                            sum[i][j] = Vec::dot_two(sum[i][j], even[j], first, odd[j], second);
                    }
                }
            }
        }
        UNROLL for (int j = 0; j < J; ++j) {
            const int64_t at = g * kBlockRows + lane + kLanes * j;
            const F scale = Vec::scale(block.scale, block.scale_type, at);
            if (block.zero) {
                const I zero = Vec::load_bytes(block.zero + at);
                UNROLL for (int i = 0; i < R; ++i) sum[i][j] = Vec::sub(sum[i][j], Vec::multiply(zero, Vec::set(sums[i])));
            }
            UNROLL for (int i = 0; i < R; ++i) total[i][j] = Vec::fma(Vec::to_float(sum[i][j]), scale, total[i][j]);
        }
    }
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int j = 0; j < J; ++j) Vec::store(y + i * kBlockRows + lane + kLanes * j, total[i][j]);
}

template <int BITS, int R, int J>
void direct_float_lanes(const Block& block, int lane, const float* x, const float* sums, float* y) {
    using S = Step<BITS>;
    constexpr int offset = Vec::offset<BITS>();
    constexpr bool in_place = R == 1 && BITS != 3 && Vec::kInPlace;
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
                prefetch<BITS>(words + 4 * kLanes * j, 4 * kLanes * j);
            }
            UNROLL for (int q = 0; q < S::quads; ++q)
                UNROLL for (int t = 0; t < 4; ++t) {
                    F feature[R];
                    UNROLL for (int i = 0; i < R; ++i) feature[i] = Vec::spread(x + (4 * q + t) * R + i);
                    if constexpr (in_place)
                        feature[0] = Vec::mul(feature[0], Vec::spread(1.0f / float(1 << place_of<BITS>(q, t))));
                    UNROLL for (int j = 0; j < J; ++j) {
                        F code;
                        if constexpr (in_place)
                            code = number_in_place<BITS>(word[j], q, t);
                        else
                            code = number<BITS>(word[j], q, t);
                        UNROLL for (int i = 0; i < R; ++i) sum[i][j][t % C] = Vec::fma(code, feature[i], sum[i][j][t % C]);
                    }
                }
        }
        UNROLL for (int j = 0; j < J; ++j) {
            const int64_t at = g * kBlockRows + lane + kLanes * j;
            const F scale = Vec::scale(block.scale, block.scale_type, at);
            const F zero = block.zero ? Vec::to_float(Vec::load_bytes(block.zero + at)) : Vec::spread(float(S::middle));
            const F off = Vec::sub(Vec::spread(float(offset)), zero);
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

// panel [K][64] float32: the weights, rounded once, as `dequantize` gives them.
template <int BITS>
void expand_float_bits(const Block& block, int64_t first, int64_t last, uint8_t* panel) {
    using S = Step<BITS>;
    constexpr int offset = Vec::offset<BITS>();
    float* out = reinterpret_cast<float*>(panel);
    const uint8_t* words = block.words + first * block.steps * S::lines * kLineBytes;
    for (int64_t g = first; g < last; ++g)
        for (int64_t s = 0; s < block.steps; ++s, words += S::lines * kLineBytes, out += 4 * S::quads * kBlockRows)
            for (int lane = 0; lane < kBlockRows; lane += kLanes) {
                I word[S::lines];
                load_words<BITS>(words + 4 * lane, word);
                prefetch<BITS>(words + 4 * lane, 4 * lane);
                const int64_t at = g * kBlockRows + lane;
                const F scale = Vec::scale(block.scale, block.scale_type, at);
                const F zero = block.zero ? Vec::to_float(Vec::load_bytes(block.zero + at)) : Vec::spread(float(S::middle));
                const F off = Vec::sub(zero, Vec::spread(float(offset)));
                UNROLL for (int q = 0; q < S::quads; ++q)
                    UNROLL for (int t = 0; t < 4; ++t)
                        Vec::store(out + (4 * q + t) * kBlockRows + lane, Vec::mul(Vec::sub(number<BITS>(word, q, t), off), scale));
            }
}

template <int R, int J>
void panel_float_lanes(int lane, const float* panel, int64_t features, const float* x, float* y) {
    F sum[R][J];
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int j = 0; j < J; ++j) sum[i][j] = Vec::load_floats(y + i * kBlockRows + lane + kLanes * j);
    panel += lane;
    for (int64_t k = 0; k < features; ++k, panel += kBlockRows, x += R) {
        F w[J];
        UNROLL for (int j = 0; j < J; ++j) w[j] = Vec::load_floats(panel + kLanes * j);
        UNROLL for (int i = 0; i < R; ++i) {
            const F feature = Vec::spread(x + i);
            UNROLL for (int j = 0; j < J; ++j) sum[i][j] = Vec::fma(w[j], feature, sum[i][j]);
        }
    }
    UNROLL for (int i = 0; i < R; ++i)
        UNROLL for (int j = 0; j < J; ++j) Vec::store(y + i * kBlockRows + lane + kLanes * j, sum[i][j]);
}

// The limits: see isa.h. What is multiplied comes from memory, so that the compiler cannot work it out beforehand.
int32_t read_bytes(const uint8_t* bytes, int64_t n) {
    I all[4] = {Vec::set(0), Vec::set(0), Vec::set(0), Vec::set(0)};
    for (int64_t at = 0; at < n; at += 16 * kLanes)
        UNROLL for (int j = 0; j < 4; ++j) all[j] = Vec::or_(all[j], Vec::load(bytes + at + 4 * kLanes * j));
    uint8_t words[4 * kLanes];
    Vec::store_words(words, Vec::or_(Vec::or_(all[0], all[1]), Vec::or_(all[2], all[3])));
    return words[0];
}

volatile int8_t seed[4] = {1, 2, 3, 4};

float peak_float(int64_t n) {
    const float one = float(seed[0]);
    const F factor = Vec::spread(one);
    F sum[kPeakVectors];
    UNROLL for (int j = 0; j < kPeakVectors; ++j) sum[j] = Vec::spread(one * float(j));
    for (int64_t i = 0; i < n; ++i) UNROLL for (int j = 0; j < kPeakVectors; ++j) sum[j] = Vec::fma(sum[j], factor, factor);
    float total = 0, lanes[kLanes];
    for (int j = 0; j < kPeakVectors; ++j) {
        Vec::store(lanes, sum[j]);
        total += lanes[0];
    }
    return total;
}

int32_t peak_int8(int64_t n) {
    const int8_t four[4] = {seed[0], seed[1], seed[2], seed[3]};
    const int8_t swapped[4] = {seed[3], seed[2], seed[1], seed[0]};
    const I bytes = Vec::broadcast(four), others = Vec::broadcast(swapped);
    I sum[kPeakVectors];
    UNROLL for (int j = 0; j < kPeakVectors; ++j) sum[j] = Vec::set(four[0] * j);
    // The sums are the second factor of the next products: no turn can be left out.
    for (int64_t i = 0; i < n; i += 2)
        UNROLL for (int j = 0; j < kPeakVectors; ++j) sum[j] = Vec::dot_two(sum[j], bytes, sum[j], others, sum[j]);
    int32_t total = 0;
    uint8_t words[4 * kLanes];
    for (int j = 0; j < kPeakVectors; ++j) {
        Vec::store_words(words, sum[j]);
        total += words[0];
    }
    return total;
}

// What follows turns numbers known at run time into template arguments.
template <int BITS, int R>
void direct_int8_rows(const Block& block, const int8_t* x, const int32_t* sums, float* y) {
    constexpr int J = kDirectVectors[R - 1];
    for (int lane = 0; lane < kBlockRows; lane += kLanes * J) direct_int8_lanes<BITS, R, J>(block, lane, x, sums, y);
}

template <int BITS, int R>
void direct_float_rows(const Block& block, const float* x, const float* sums, float* y) {
    constexpr int J = kDirectVectors[R - 1];
    for (int lane = 0; lane < kBlockRows; lane += kLanes * J) direct_float_lanes<BITS, R, J>(block, lane, x, sums, y);
}

#define BY_BITS(function, ...)                       \
    switch (block.bits) {                            \
        case 2: return function<2 __VA_ARGS__;       \
        case 3: return function<3 __VA_ARGS__;       \
        case 4: return function<4 __VA_ARGS__;       \
        default: return function<8 __VA_ARGS__;      \
    }
#define BY_DIRECT_ROWS(function, arguments)                         \
    switch (rows) {                                                 \
        case 1: BY_BITS(function, , 1> arguments)                   \
        case 2: BY_BITS(function, , 2> arguments)                   \
        case 3: BY_BITS(function, , 3> arguments)                   \
        case 4: BY_BITS(function, , 4> arguments)                   \
        default: BY_BITS(function, , 5> arguments)                  \
    }

void direct_int8(const Block& block, int rows, const int8_t* x, const int32_t* sums, float* y) {
    BY_DIRECT_ROWS(direct_int8_rows, (block, x, sums, y))
}

void direct_float(const Block& block, int rows, const float* x, const float* sums, float* y) {
    BY_DIRECT_ROWS(direct_float_rows, (block, x, sums, y))
}

void expand_float(const Block& block, int64_t first, int64_t last, uint8_t* panel) {
    BY_BITS(expand_float_bits, > (block, first, last, panel))
}

inline int step_quads(const Block& block) { return block.bits == 3 ? 8 : 8 / block.bits; }

template <int R>
void panel_float_rows(const Block& block, const uint8_t* panel, int64_t first, int64_t last, const float* x, float* y) {
    constexpr int J = kPanelVectors;
    for (int lane = 0; lane < kBlockRows; lane += kLanes * J)
        panel_float_lanes<R, J>(lane, reinterpret_cast<const float*>(panel), (last - first) * block.steps * step_quads(block) * 4, x, y);
}

#define BY_PANEL_ROWS(function, arguments)        \
    switch (rows) {                               \
        case 1: return function<1> arguments;     \
        case 2: return function<2> arguments;     \
        case 3: return function<3> arguments;     \
        case 4: return function<4> arguments;     \
        case 5: return function<5> arguments;     \
        default: return function<6> arguments;    \
    }

void panel_float(const Block& block, const uint8_t* panel, int64_t first, int64_t last, int rows, const float* x,
                 const float*, float* y) {
    BY_PANEL_ROWS(panel_float_rows, (block, panel, first, last, x, y))
}

}  // namespace
}  // namespace remanence

#include "x_rows.h"
