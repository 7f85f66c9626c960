// What is done to rows of x and of y. Each product is rounded on its own (-ffp-contract=off): all instruction sets and
// torch give the same bits.
#include "halves.h"
#include "isa.h"

namespace remanence {
namespace {

void load_row(const void* row, ScaleType type, int64_t k, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) Vec::store(out + i, Vec::scale(row, type, i));
    for (; i < k; ++i) out[i] = load_scale_at(row, type, i);
}

void store_row(const float* row, ScaleType type, int64_t n, void* out) {
    uint16_t* const halves = static_cast<uint16_t*>(out);
    if (type == ScaleType::float32) {
        __builtin_memcpy(out, row, n * sizeof(float));
    } else if (type == ScaleType::bfloat16) {
        for (int64_t i = 0; i < n; ++i) halves[i] = to_bfloat(row[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) halves[i] = to_half(row[i]);
    }
}

// Into a tile of `height` rows (isa.h); the sum of what was placed. Sixteen partial sums: the compiler may use vectors,
// and the rounding error grows with count / 16.
template <typename Get>
inline float sum_of(int64_t count, const Get& get) {
    float sums[16] = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int j = 0; j < 16; ++j) sums[j] += get(i + j);
    for (int j = 0; i + j < count; ++j) sums[j] += get(i + j);
    for (int width = 8; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
    return sums[0];
}

float place_float(const float* from, int64_t count, int64_t height, float* tile) {
    if (height == 1)
        __builtin_memcpy(tile, from, count * sizeof(float));
    else
        for (int64_t i = 0; i < count; ++i) tile[i * height] = from[i];
    return sum_of(count, [from](int64_t i) { return from[i]; });
}

int32_t place_int8(const int8_t* from, int64_t count, int64_t height, int8_t* tile) {
    int64_t i = 0;
    if (height == 1)
        __builtin_memcpy(tile, from, count);
    else {
        for (; i + 4 <= count; i += 4, tile += 4 * height) __builtin_memcpy(tile, from + i, 4);
        __builtin_memcpy(tile, from + i, count - i);
    }
    int32_t sum = 0;
    for (i = 0; i < count; ++i) sum += from[i];
    return sum;
}

struct Range {
    float low, high;    // with zero between
    bool number;        // no NaN among them
    bool finite;
};

Range range_of(const float* x, int64_t k) {
    F low = Vec::zero(), high = low, poison = low;
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) {
        const F v = Vec::load_floats(x + i);
        low = Vec::min(v, low);
        high = Vec::max(v, high);
        poison = Vec::add(poison, Vec::mul(v, Vec::zero()));    // NaN from what is infinite or no number
    }
    float lows[kLanes], highs[kLanes], poisons[kLanes];
    Vec::store(lows, low);
    Vec::store(highs, high);
    Vec::store(poisons, poison);
    Range range = {0, 0, true, true};
    const auto widen = [&range](float l, float h) {
        range.low = l < range.low ? l : range.low;
        range.high = h > range.high ? h : range.high;
    };
    for (int j = 0; j < kLanes; ++j) {
        widen(lows[j], highs[j]);
        range.finite = range.finite && poisons[j] == 0;
    }
    for (; i < k; ++i) {
        widen(x[i], x[i]);
        range.finite = range.finite && x[i] * 0 == 0;
    }
    if (range.finite) return range;
    for (i = 0; i < k; ++i) {
        range.number = range.number && x[i] == x[i];
        widen(x[i], x[i]);
    }
    return range;
}

// Adding and taking 1.5 * 2^23 rounds to the nearest integer, ties to even, as long as |v| < 2^22.
inline float nearest(float v) { return (v + 12582912.0f) - 12582912.0f; }

void quantize_row(const float* x, int64_t k, const Grid& grid, int8_t* codes, float* scale_out, int32_t* zero_out) {
    const float nan = __builtin_nanf("");
    const bool narrow = !grid.scale && grid.kind == GridKind::narrow;
    const float most = float(1 << (grid.bits - 1)) - 1, least = narrow ? -most : -most - 1;
    const Range range = range_of(x, k);
    float scale, zero = 0;
    if (grid.scale) {
        scale = *grid.scale;
        zero = float(*grid.zero);
    } else {
        const float low = grid.clip * range.low, high = grid.clip * range.high, steps = most - least;
        scale = grid.kind != GridKind::asymmetric ? (-low > high ? -low : high) / (steps / 2) : (high - low) / steps;
        scale = !range.number ? nan : scale == 0 ? 1 : scale;
        if (grid.kind == GridKind::asymmetric) {
            const float exact = least - low / scale;
            zero = exact != exact ? 0 : nearest(exact);
        }
    }
    // The largest of a row lies in the middle between two codes (of a narrow grid, on one): as a negative number it has
    // the lowest, always.
    const float magnitude = -range.low > range.high ? -range.low : range.high;
    const bool ruled = !grid.scale && grid.kind == GridKind::symmetric && magnitude > 0 && range.number;
    const float lowest = ruled ? -magnitude : nan;
    int64_t i = 0;
    if (range.finite && scale * 0 == 0) {
        const F s = Vec::spread(scale), z = Vec::spread(zero), under = Vec::spread(least), over = Vec::spread(most);
        for (; i + kLanes <= k; i += kLanes) {
            const F v = Vec::load_floats(x + i);
            const F at = Vec::max(Vec::min(Vec::add(Vec::div(v, s), z), over), under);
            Vec::store_bytes(codes + i, Vec::where_equal(v, Vec::spread(lowest), Vec::set(int32_t(least)), Vec::nearest(at)));
        }
    }
    for (; i < k; ++i) {
        float v = x[i] / scale + zero;
        v = v < least ? least : v > most ? most : v;
        v = v == v ? nearest(v) : 0;    // what is no number is carried by the scale
        codes[i] = int8_t(x[i] == lowest ? least : v);
    }
    *scale_out = range.number ? scale : nan;
    *zero_out = int32_t(zero);
}

void hadamard_row(float* x, int64_t n, float factor) {
    for (int64_t width = 1; width < n; width *= 2)
        for (int64_t begin = 0; begin < n; begin += 2 * width)
            for (int64_t i = begin; i < begin + width; ++i) {
                const float a = x[i], b = x[i + width];
                x[i] = a + b;
                x[i + width] = a - b;
            }
    for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

}  // namespace
}  // namespace remanence
