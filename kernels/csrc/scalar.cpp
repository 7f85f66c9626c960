// Portable kernels: the fallback of every architecture, and the tails of the wider ones.
#include "halves.h"
#include "isa.h"
#include "rows_wide.h"

namespace remanence {

namespace scalar {

void unpack_row(const uint8_t* packed, int64_t k, int bits, uint8_t* codes) {
    const uint64_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < k; i += 8, packed += bits) {    // eight codes are `bits` bytes
        const int count = k - i < 8 ? int(k - i) : 8;
        uint64_t stream = 0;
        for (int j = 0; j < (count * bits + 7) / 8; ++j) stream |= uint64_t(packed[j]) << (8 * j);
        for (int j = 0; j < count; ++j) codes[i + j] = uint8_t(stream >> (j * bits) & mask);
    }
}

void scale_row(const uint8_t* codes, const float* scale, const float* zero, int64_t groups, int64_t group_size,
               float* w) {
    for (int64_t g = 0; g < groups; ++g, codes += group_size, w += group_size)
        for (int64_t i = 0; i < group_size; ++i) w[i] = (float(codes[i]) - zero[g]) * scale[g];
}

}  // namespace scalar

namespace {

// Vectors of 16 lanes in plain loops: the compiler makes of them what it can.
struct Vec {
    static constexpr int kLanes = 16;
    struct F {
        float lane[kLanes];
    };
    struct I {
        int32_t lane[kLanes];
    };

    template <typename T, typename Make>
    static T each(Make make) {
        T out;
        for (int i = 0; i < kLanes; ++i) out.lane[i] = make(i);
        return out;
    }

    static F zero() { return spread(0.0f); }
    static F spread(float value) {
        return each<F>([&](int) { return value; });
    }
    static F spread(const float* x) { return spread(*x); }
    static I set(int32_t value) {
        return each<I>([&](int) { return value; });
    }
    static I broadcast(const int8_t* x) {
        int32_t four;
        __builtin_memcpy(&four, x, 4);
        return set(four);
    }
    static I load(const uint8_t* words) {
        I out;
        __builtin_memcpy(&out, words, sizeof out);
        return out;
    }
    static void store_words(uint8_t* words, I v) { __builtin_memcpy(words, &v, sizeof v); }
    static F load_floats(const float* x) {
        F out;
        __builtin_memcpy(&out, x, sizeof out);
        return out;
    }
    static void store(float* x, F v) { __builtin_memcpy(x, &v, sizeof v); }
    static I load_bytes(const uint8_t* x) {
        return each<I>([&](int i) { return int32_t(x[i]); });
    }
    static F scale(const void* scale, ScaleType type, int64_t at) {
        return each<F>([&](int i) { return load_scale_at(scale, type, at + i); });
    }

    static I shift_right(I v, int bits) {
        return each<I>([&](int i) { return int32_t(uint32_t(v.lane[i]) >> bits); });
    }
    static I shift_left(I v, int bits) {
        return each<I>([&](int i) { return int32_t(uint32_t(v.lane[i]) << bits); });
    }
    static I and_(I a, I b) {
        return each<I>([&](int i) { return a.lane[i] & b.lane[i]; });
    }
    static I or_(I a, I b) {
        return each<I>([&](int i) { return a.lane[i] | b.lane[i]; });
    }
    static I sub(I a, I b) {
        return each<I>([&](int i) { return a.lane[i] - b.lane[i]; });
    }
    static I multiply(I a, I b) {
        return each<I>([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    static F to_float(I v) {
        return each<F>([&](int i) { return float(v.lane[i]); });
    }
    static F add(F a, F b) {
        return each<F>([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static F sub(F a, F b) {
        return each<F>([&](int i) { return a.lane[i] - b.lane[i]; });
    }
    static F mul(F a, F b) {
        return each<F>([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    // Two roundings: one would be a call of a function on machines without the instruction.
    static F fma(F a, F b, F c) {
        return each<F>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }

    static F div(F a, F b) {
        return each<F>([&](int i) { return a.lane[i] / b.lane[i]; });
    }
    static F min(F a, F b) {
        return each<F>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static F max(F a, F b) {
        return each<F>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    // Of numbers below 2^22; see nearest in x_rows.h.
    static I nearest(F v) {
        return each<I>([&](int i) { return int32_t((v.lane[i] + 12582912.0f) - 12582912.0f); });
    }
    static I where_equal(F a, F b, I then, I otherwise) {
        return each<I>([&](int i) { return a.lane[i] == b.lane[i] ? then.lane[i] : otherwise.lane[i]; });
    }
    static void store_bytes(int8_t* out, I v) {
        for (int i = 0; i < kLanes; ++i) out[i] = int8_t(v.lane[i]);
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

    static I dot_wide(I sum, I codes, I x) {
        return each<I>([&](int i) {
            int32_t out = sum.lane[i];
            for (int b = 0; b < 32; b += 8)
                out += int32_t(uint8_t(codes.lane[i] >> b)) * int8_t(x.lane[i] >> b);
            return out;
        });
    }
    static I dot_two(I sum, I codes, I x, I more, I other) { return dot_wide(dot_wide(sum, codes, x), more, other); }
};

constexpr int kDirectVectors[] = {1, 1, 1, 1, 1};
constexpr int kPanelVectors = 1;

}  // namespace
}  // namespace remanence

#include "tiles.h"

#include "sparse24_rows.h"

namespace remanence {

const Kernels scalar_kernels = {"scalar",
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
