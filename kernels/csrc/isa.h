// What one instruction set provides: three functions on a single row, in a table.
//
// Layout of a stored weight with N output rows, K input features, G groups a row and `bits` a code:
//   codes  uint8 [N, K]                     0 .. 2^bits - 1, one byte each
//   packed uint8 [N, 4 * ceil(K*bits/32)]   code i of a row is bits i*bits .. (i+1)*bits - 1 of that row, lowest first
//   scale  [N, G] in float32, float16 or bfloat16
//   zero   uint8 [N, G] in code units, or null: 2^(bits-1)
#pragma once

#include <stdint.h>

namespace remanence {

struct Kernels {
    const char* name;
    void (*unpack_row)(const uint8_t* packed, int64_t k, int bits, uint8_t* codes);
    // w[i] = (codes[i] - zero[g]) * scale[g]: only the product is rounded, so every table gives the same bits.
    void (*scale_row)(const uint8_t* codes, const float* scale, const float* zero, int64_t groups,
                      int64_t group_size, float* w);
    float (*dot)(const float* a, const float* b, int64_t k);
};

const Kernels& kernels();    // the table in use (dispatch.cpp)

extern const Kernels scalar_kernels;
#ifdef REMANENCE_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// static: each file keeps its own copy, compiled for its own instruction set.
static inline int64_t packed_width(int64_t k, int bits) { return (k * bits + 31) / 32 * 4; }

}  // namespace remanence
