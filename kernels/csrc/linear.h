// y = x @ w.T + bias, and what belongs to it on whole matrices.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace remanence {

// A matrix in float32, float16 or bfloat16, row by row.
struct Matrix {
    const void* data;
    ScaleType type;
};

struct Linear {
    Matrix x;                 // [m, K]
    const uint8_t* blocks;    // the weight in the run-time layout, or null: it is stored as `weight` says
    Weight weight;            // zero: with blocks only whether there is one
    Matrix bias;              // [N]; data null: none
    void* y;                  // [m, N], of x's type
    int64_t m;
    int threads;
};

void linear(const Linear& call);                       // x as it is
void linear(const Linear& call, const Grid& grid);     // x rounded to integers first

// x [m, K] -> codes int8 [m, K], scale float32 [m], zero int32 [m]
void quantize_per_token(const Matrix& x, int64_t m, int64_t k, const Grid& grid, int8_t* codes, float* scale,
                        int32_t* zero, int threads);
// y = x H / sqrt(n), rows of n = 2^j numbers, y of x's type
void hadamard(const Matrix& x, void* y, int64_t m, int64_t n, int threads);

}  // namespace remanence
