// The parallel loops over output rows.
#include "rows.h"

#include <string.h>

#include "halves.h"
#include "isa.h"
#include "parallel.h"

namespace remanence {
namespace {

void load_scale(const Weight& weight, int64_t row, float* scale) {
    for (int64_t g = 0; g < weight.groups; ++g)
        scale[g] = load_scale_at(weight.scale, weight.scale_type, row * weight.groups + g);
}

void load_zero(const Weight& weight, int64_t row, float* zero) {
    const float middle = float(1 << (weight.bits - 1));
    for (int64_t g = 0; g < weight.groups; ++g)
        zero[g] = weight.zero ? float(weight.zero[row * weight.groups + g]) : middle;
}

// What a thread needs for one row; kept between calls, it grows to the largest K seen.
struct Scratch {
    std::vector<uint8_t> codes;
    std::vector<float> scale, zero, w;
};
thread_local Scratch scratch;

void dequantize_row(const Kernels& kernel, const Weight& weight, int64_t row, float* w) {
    scratch.codes.resize(weight.k);
    scratch.scale.resize(weight.groups);
    scratch.zero.resize(weight.groups);
    const uint8_t* const packed = weight.packed + row * packed_width(weight.k, weight.bits);
    kernel.unpack_row(packed, weight.k, weight.bits, scratch.codes.data());
    load_scale(weight, row, scratch.scale.data());
    load_zero(weight, row, scratch.zero.data());
    kernel.scale_row(scratch.codes.data(), scratch.scale.data(), scratch.zero.data(), weight.groups,
                     weight.k / weight.groups, w);
}

void pack_row(const uint8_t* codes, int64_t k, int bits, uint8_t* packed) {
    memset(packed, 0, packed_width(k, bits));    // the padding is part of the file
    for (int64_t i = 0; i < k; i += 8, packed += bits) {    // eight codes are `bits` bytes
        const int count = k - i < 8 ? int(k - i) : 8;
        uint64_t stream = 0;
        for (int j = 0; j < count; ++j) stream |= uint64_t(codes[i + j]) << (j * bits);
        for (int j = 0; j < (count * bits + 7) / 8; ++j) packed[j] = uint8_t(stream >> (8 * j));
    }
}

}  // namespace

void pack(const uint8_t* codes, uint8_t* packed, int64_t n, int64_t k, int bits, int threads) {
    const int64_t width = packed_width(k, bits);
    parallel(n, threads, n * k, [&](int64_t row) { pack_row(codes + row * k, k, bits, packed + row * width); });
}

void unpack(const uint8_t* packed, uint8_t* codes, int64_t n, int64_t k, int bits, int threads) {
    const Kernels& kernel = kernels();
    const int64_t width = packed_width(k, bits);
    parallel(n, threads, n * k, [&](int64_t row) { kernel.unpack_row(packed + row * width, k, bits, codes + row * k); });
}

void dequantize(const Weight& weight, float* w, int threads) {
    const Kernels& kernel = kernels();
    parallel(weight.n, threads, weight.n * weight.k,
             [&](int64_t row) { dequantize_row(kernel, weight, row, w + row * weight.k); });
}

}  // namespace remanence
