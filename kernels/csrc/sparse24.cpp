// How a product with a 2:4 weight is cut up: x becomes float32 once; then each thread takes blocks of rows of the
// weight, and a pair of rows, expanded in registers, meets a few rows of x at once.
#include "sparse24.h"

#include <string.h>

#include "halves.h"
#include "memory.h"
#include "parallel.h"

namespace remanence {
namespace {

thread_local Memory wide, sums;

int64_t bytes_of(ScaleType type) { return type == ScaleType::float32 ? 4 : 2; }

}  // namespace

void sparse24_linear(const Matrix& x, const Sparse24& weight, const Matrix& bias, void* y, int64_t m, int threads) {
    const Kernels& kernel = kernels();
    const int64_t n = weight.n, k = weight.k, stride = padded24(k);
    float* const rows = wide.get<float>(m * stride);
    const auto row_at = [&](const void* data, int64_t at) {
        return static_cast<const uint8_t*>(data) + at * bytes_of(x.type);
    };
    parallel(m, threads, m * k, [&](int64_t i) {
        kernel.load_row(row_at(x.data, i * k), x.type, k, rows + i * stride);
        memset(rows + i * stride + k, 0, (stride - k) * sizeof(float));
    });
    parallel((n + kBlock24 - 1) / kBlock24, threads, m * n * k, [&](int64_t block) {
        const int64_t begin = block * kBlock24, width = n - begin < kBlock24 ? n - begin : kBlock24;
        float* const out = sums.get<float>(m * kBlock24);
        for (int64_t j = 0; j < width; j += 2)
            for (int64_t i = 0; i < m; i += kRows24)
                kernel.multiply24(weight, begin + j, j + 1 < width ? 2 : 1, int(m - i < kRows24 ? m - i : kRows24),
                                  rows + i * stride, out + i * kBlock24 + j);
        float added[kBlock24] = {};
        if (bias.data)
            for (int64_t j = 0; j < width; ++j) added[j] = load_scale_at(bias.data, bias.type, begin + j);
        for (int64_t i = 0; i < m; ++i) {
            float* const row = out + i * kBlock24;
            if (bias.data)
                for (int64_t j = 0; j < width; ++j) row[j] += added[j];
            kernel.store_row(row, x.type, width, const_cast<uint8_t*>(row_at(y, i * n + begin)));
        }
    });
}

void expand24(const Sparse24& weight, float* w, int threads) {
    const Kernels& kernel = kernels();
    parallel(weight.n, threads, weight.n * weight.k,
             [&](int64_t row) { kernel.expand24(weight, row, w + row * weight.k); });
}

}  // namespace remanence
