// y = x @ w.T + bias with a 2:4 weight (isa.h has its layout), and the weight itself.
#pragma once

#include <stdint.h>

#include "linear.h"

namespace remanence {

// x [m, K], bias [N] or null, y [m, N] of x's type.
void sparse24_linear(const Matrix& x, const Sparse24& weight, const Matrix& bias, void* y, int64_t m, int threads);
void expand24(const Sparse24& weight, float* w, int threads);    // -> w [N, K]

}  // namespace remanence
