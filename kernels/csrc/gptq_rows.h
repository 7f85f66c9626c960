// The bodies of the kernels: included once for every instruction set, with LANES defined, the floats of its vectors.
// Each operation is done as it is written (-ffp-contract=off), so that all instruction sets give the same bits; those
// of gptq_rows are plain torch's, too.
#pragma once

#include <string.h>

#include "gptq.h"

namespace remanence {

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

// Adding and taking away 1.5 * 2^23 rounds to even what is below 2^22.
constexpr float kRounder = 12582912.0f;

static void gptq_rows(const GptqBlock& block, int64_t first, int count, float* scratch) {
    constexpr float kFar = 1048576.0f;    // beyond all codes
    const int64_t B = block.b;
    const float most = float((1 << block.bits) - 1);
    const float middle = float(1 << (block.bits - 1));
    Lanes* const columns = reinterpret_cast<Lanes*>(scratch);
    const Lanes nothing = {};

    for (int64_t i = 0; i < B; ++i) columns[i] = nothing;    // rows that are not there
    for (int r = 0; r < count; ++r)
        for (int64_t i = 0; i < B; ++i) scratch[i * LANES + r] = block.running[(first + r) * block.stride + i];

    Lanes scale = nothing + 1.0f, zero = nothing + middle;
    int64_t loaded = -1;
    for (int64_t i = 0; i < B; ++i) {
        if (block.group[i] != loaded) {
            loaded = block.group[i];
            for (int r = 0; r < count; ++r) {
                const int64_t at = (first + r) * block.groups + loaded;
                scale[r] = block.scale[at];
                if (block.zero) zero[r] = float(block.zero[at]);
            }
        }
        const Lanes w = columns[i];
        Lanes code = w / scale;
        code = code < -kFar ? nothing - kFar : code;
        code = code > kFar ? nothing + kFar : code;
        code = (code + kRounder) - kRounder;
        code = code + zero;
        code = code < 0.0f ? nothing : code;
        code = code > most ? nothing + most : code;
        for (int r = 0; r < count; ++r) {
            if (block.kept && !block.kept[(first + r) * B + i]) code[r] = zero[r];
            block.codes[(first + r) * B + i] = uint8_t(code[r]);
        }
        const Lanes error = (w - (code - zero) * scale) / block.upper[i * B + i];
        const float* const upper = block.upper + i * B;
        if (block.push) {
            const float* const push = block.push + i * B;
            for (int64_t j = i + 1; j < B; ++j) columns[j] = columns[j] - (error * upper[j] - w * push[j]);
        } else {
            for (int64_t j = i + 1; j < B; ++j) columns[j] = columns[j] - error * upper[j];
        }
        columns[i] = error;    // the column is done: its place keeps the errors
    }
    for (int r = 0; r < count; ++r)
        for (int64_t i = 0; i < B; ++i) block.errors[(first + r) * B + i] = scratch[i * LANES + r];
}

// y becomes y^1.2, for y from 1e-30 on: y * y * (y^-0.2)^4, the fifth root by a guess from the exponent, 3% off at most,
// and the series of (1 - e)^-0.2 with e = 1 - t^5 y, to the second and then to the first power: 2e-6 in all.
static inline void raise(Lanes& y) {
    Integers bits;
    memcpy(&bits, &y, sizeof bits);
    bits = __builtin_convertvector(__builtin_convertvector(bits, Lanes) * -0.2f + 1277920000.0f, Integers);
    Lanes t;
    memcpy(&t, &bits, sizeof t);
    Lanes t2 = t * t;
    Lanes e = 1.0f - t2 * t2 * t * y;
    t = t + t * e * (0.2f + 0.12f * e);
    t2 = t * t;
    e = 1.0f - t2 * t2 * t * y;
    t = t + t * e * 0.2f;
    t2 = t * t;
    y = y * y * (t2 * t2);
}

static void clip_row(const ClipError& clip, int64_t m) {
    constexpr float kTiny = 1e-30f;
    const float most = float((1 << clip.bits) - 1);
    const float middle = float(1 << (clip.bits - 1));
    const float* const w = clip.w + m * clip.g;
    const Lanes nothing = {};
    for (int64_t first = 0; first < clip.s; first += LANES) {
        const int count = clip.s - first < LANES ? int(clip.s - first) : LANES;
        Lanes scale = nothing + 1.0f, zero = nothing + middle;
        for (int i = 0; i < count; ++i) {
            scale[i] = clip.scale[m * clip.s + first + i];
            if (clip.zero) zero[i] = float(clip.zero[m * clip.s + first + i]);
        }
        const Lanes inverse = 1.0f / scale, low = -zero, high = most - zero;
        Lanes sum = nothing;
        for (int64_t i = 0; i < clip.g; ++i) {
            const Lanes x = w[i] * inverse;
            Lanes q = x < low ? low : x;
            q = q > high ? high : q;
            q = (q + kRounder) - kRounder;
            const Lanes off = q - x;
            Lanes part = off * off;
            part = part < kTiny ? nothing + kTiny : part;
            raise(part);
            sum = sum + part;
        }
        // Back from steps of the grid to the weights' units.
        Lanes step = scale * scale;
        step = step < kTiny ? nothing + kTiny : step;
        raise(step);
        sum = sum * step;
        for (int i = 0; i < count; ++i) clip.error[m * clip.s + first + i] = sum[i];
    }
}

}  // namespace remanence
