// Rows of a 2:4 weight, written once: each vector of features is expanded in a register, with zeros where none is kept,
// so that what is not finite in x gives what a dense weight gives. Included after tiles.h.
#include "isa.h"

namespace remanence {
namespace {

// One row of the weight, by vectors of kLanes features; the last, if not whole, from a copy with zeros after it.
template <ScaleType TYPE>
struct Row24 {
    static constexpr int kBytes = TYPE == ScaleType::float32 ? 4 : 2;
    const uint8_t* values;
    const uint8_t* bitmask;
    uint8_t last[kLanes / 2 * kBytes] = {};
    uint32_t last_marked = 0;

    Row24(const Sparse24& weight, int64_t row)
        : values(static_cast<const uint8_t*>(weight.values) + row * (weight.k / 2) * kBytes),
          bitmask(weight.bitmask + row * ((weight.k + 7) / 8)) {
        const int64_t whole = weight.k / kLanes * kLanes, rest = weight.k - whole;
        __builtin_memcpy(last, values + whole / 2 * kBytes, rest / 2 * kBytes);
        for (int64_t k = 0; k < rest; k += 8) last_marked |= uint32_t(bitmask[(whole + k) / 8]) << k;
        last_marked &= (1u << rest) - 1;
    }

    F at(int64_t k) const {
        const uint8_t* const byte = bitmask + k / 8;
        const uint32_t marked = kLanes == 4   ? *byte >> k % 8 & 15
                                : kLanes == 8 ? *byte
                                              : *byte | uint32_t(byte[1]) << 8;
        return Vec::expand24<TYPE>(values + k / 2 * kBytes, marked);
    }
    // The same place in the next pair of rows, which the hardware, stopping at every page, would fetch late: 1.3 times
    // as fast with one row of x.
    void prefetch(int64_t k, int64_t all) const { __builtin_prefetch(values + (all + k / 2) * kBytes); }
    F rest() const { return Vec::expand24<TYPE>(last, last_marked); }
};

inline float sum_lanes(F v) {
    float lanes[kLanes];
    Vec::store(lanes, v);
    UNROLL for (int width = kLanes / 2; width > 0; width /= 2)
        UNROLL for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

// Two rows of the weight by R rows of x: y[i * kBlock24], y[i * kBlock24 + 1].
template <ScaleType TYPE, int R>
void multiply24_rows(const Row24<TYPE>* row, int count, int64_t k, const float* x, float* y) {
    constexpr int S = R == 1 ? 4 : R == 2 ? 2 : 1;    // steps: as many sums as an addition takes cycles, or more
    const int64_t stride = padded24(k);
    F sum[S][R][2];
    UNROLL for (int s = 0; s < S; ++s)
        UNROLL for (int i = 0; i < R; ++i) sum[s][i][0] = sum[s][i][1] = Vec::zero();
    const auto add = [&](F (&to)[R][2], F first, F second, int64_t at) {
        UNROLL for (int i = 0; i < R; ++i) {
            const F features = Vec::load_floats(x + i * stride + at);
            to[i][0] = Vec::fma(first, features, to[i][0]);
            to[i][1] = Vec::fma(second, features, to[i][1]);
        }
    };
    int64_t at = 0;
    for (; at + S * kLanes <= k; at += S * kLanes) {
        row[0].prefetch(at, k);
        row[1].prefetch(at, k);
        UNROLL for (int s = 0; s < S; ++s) {
            const int64_t step = at + s * kLanes;
            add(sum[s], row[0].at(step), row[1].at(step), step);
        }
    }
    for (; at + kLanes <= k; at += kLanes) add(sum[0], row[0].at(at), row[1].at(at), at);
    if (at < k) add(sum[0], row[0].rest(), row[1].rest(), at);
    UNROLL for (int i = 0; i < R; ++i)
        for (int j = 0; j < count; ++j) {
            UNROLL for (int s = 1; s < S; ++s) sum[0][i][j] = Vec::add(sum[0][i][j], sum[s][i][j]);
            y[i * kBlock24 + j] = sum_lanes(sum[0][i][j]);
        }
}

template <ScaleType TYPE>
void multiply24_type(const Sparse24& weight, int64_t first, int count, int rows, const float* x, float* y) {
    static_assert(kRows24 == 4);
    const Row24<TYPE> row[2] = {{weight, first}, {weight, first + count - 1}};    // a single row stands in both places
    switch (rows) {
        case 1: return multiply24_rows<TYPE, 1>(row, count, weight.k, x, y);
        case 2: return multiply24_rows<TYPE, 2>(row, count, weight.k, x, y);
        case 3: return multiply24_rows<TYPE, 3>(row, count, weight.k, x, y);
        default: return multiply24_rows<TYPE, 4>(row, count, weight.k, x, y);
    }
}

template <ScaleType TYPE>
void expand24_type(const Sparse24& weight, int64_t row, float* w) {
    const Row24<TYPE> from(weight, row);
    int64_t k = 0;
    for (; k + kLanes <= weight.k; k += kLanes) Vec::store(w + k, from.at(k));
    if (k == weight.k) return;
    float last[kLanes];
    Vec::store(last, from.rest());
    __builtin_memcpy(w + k, last, (weight.k - k) * sizeof(float));
}

#define BY_TYPE(function, arguments)                                                  \
    switch (weight.type) {                                                            \
        case ScaleType::float32: return function<ScaleType::float32> arguments;       \
        case ScaleType::float16: return function<ScaleType::float16> arguments;       \
        default: return function<ScaleType::bfloat16> arguments;                      \
    }

void multiply24(const Sparse24& weight, int64_t first, int count, int rows, const float* x, float* y) {
    BY_TYPE(multiply24_type, (weight, first, count, rows, x, y))
}

void expand24(const Sparse24& weight, int64_t row, float* w) { BY_TYPE(expand24_type, (weight, row, w)) }

}  // namespace
}  // namespace remanence
