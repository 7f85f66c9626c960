// How a product is cut up. Rows of x go in chunks, and within these in tiles; rows of the weight in blocks of 64, each the
// work of one thread. With few rows of x a block is multiplied from its packed words; with more, a piece of it is expanded
// once and meets one tile after another: as many groups as the second-level cache holds, at least one. Never more of the
// weight than that is dense.
#include "linear.h"

#include <math.h>
#include <string.h>

#include <vector>

#include "halves.h"
#include "memory.h"
#include "parallel.h"

namespace remanence {
namespace {

constexpr int64_t kChunkRows = 320;     // of x: the sums of a block for all of them fit the second-level cache
constexpr int64_t kSerialRows = 2;      // rows of x for a thread, below which the caller prepares them all

float load(const Matrix& x, int64_t at) { return load_scale_at(x.data, x.type, at); }

const void* row_of(const Matrix& x, int64_t at) {
    return static_cast<const uint8_t*>(x.data) + at * (x.type == ScaleType::float32 ? 4 : 2);
}

struct Scratch {
    Memory words, scale, zero, panel, y, row;
};
thread_local Scratch scratch;    // of each thread

struct Prepared {
    Memory x, sums, scale, zero;
};
thread_local Prepared prepared;    // of the thread that calls

// Rows in tiles, or in chunks, of nearly the same height.
struct Tiles {
    int64_t rows, height;
    int64_t count() const { return (rows + height - 1) / height; }
    int64_t height_of(int64_t tile) const { return tile + 1 < count() ? height : rows - tile * height; }
};

Tiles tiles_of(int64_t rows, int64_t most) {
    const int64_t count = (rows + most - 1) / most;
    return {rows, count ? (rows + count - 1) / count : 1};
}

// Whether a row of x may be multiplied by codes before their offset (up to 4096) is taken off. One that is not finite may
// not, inf * (128 + code) - inf * 128 is no number; nor one whose products would overflow, nor one so small that numbers
// which bfloat16 products take for zero count in it. By the bits of its largest: 0, or 2^-80 and more and below 2^100,
// so that 4096 times the sum of a run stays finite.
bool regular(uint32_t largest) { return largest == 0 || (largest >= 0x17800000 && largest < 0x71800000); }

// Numbers of one kind, and how a row of x becomes them.
struct AsFloat {
    using X = float;
    using Sum = float;
    static const Multiply<X, Sum>& multiply() { return kernels().float32; }
    static constexpr bool kRounds = false;
    static constexpr int64_t kRun = 128;    // see AsBfloat: here codes are summed before their zero point is taken off

    static bool fits(const float* x, int64_t k) {
        int32_t largest = 0;
        for (int64_t i = 0; i < k; ++i) {
            const int32_t magnitude = int32_t(to_bits(x[i]) & 0x7fffffff);
            largest = magnitude > largest ? magnitude : largest;
        }
        return regular(uint32_t(largest));
    }

    static void convert(const Linear& call, const Grid*, int64_t row, float* out, float*, int32_t*) {
        kernels().load_row(row_of(call.x, row * call.weight.k), call.x.type, call.weight.k, out);
    }
};

struct AsBfloat {
    using X = uint16_t;
    using Sum = float;
    static const Multiply<X, Sum>& multiply() { return kernels().bfloat16; }
    static constexpr bool kRounds = false;
    // With 128 or 2176 added to each code the sums of many x of one sign are large, and lose what their ends differ by.
    static constexpr int64_t kRun = 512;

    static bool fits(const uint16_t* x, int64_t k) {
        int16_t largest = 0;
        for (int64_t i = 0; i < k; ++i) {
            const int16_t magnitude = int16_t(x[i] & 0x7fff);
            largest = magnitude > largest ? magnitude : largest;
        }
        return regular(uint32_t(largest) << 16);
    }

    static void convert(const Linear& call, const Grid*, int64_t row, uint16_t* out, float*, int32_t*) {
        memcpy(out, row_of(call.x, row * call.weight.k), call.weight.k * sizeof(uint16_t));
    }
};

struct AsInteger {
    using X = int8_t;
    using Sum = int32_t;
    static const Multiply<X, Sum>& multiply() { return kernels().int8; }
    static constexpr bool kRounds = true;
    static constexpr int64_t kRun = kRunCodes;

    static bool fits(const int8_t*, int64_t) { return true; }

    static void convert(const Linear& call, const Grid* grid, int64_t row, int8_t* out, float* scale, int32_t* zero) {
        const int64_t k = call.weight.k;
        const void* x = row_of(call.x, row * k);
        if (call.x.type != ScaleType::float32) {
            float* const wide = scratch.y.get<float>(k);
            kernels().load_row(x, call.x.type, k, wide);
            x = wide;
        }
        kernels().quantize_row(static_cast<const float*>(x), k, *grid, out, scale, zero);
    }
};

// Quads of a tile lie `height` quads apart; with float32 each feature does.
template <typename Kind>
constexpr int64_t kStride = sizeof(typename Kind::X) == 4 ? 1 : 4;

// Rows of x as the kernels take them, and the rows of y that come of them.
template <typename Kind>
class Chunk {
public:
    // `ones`: one row more, of ones, that gives the sums of the weight's rows. `whole`: the weight's numbers are made
    // before they are multiplied, whatever x is.
    Chunk(const Linear& call, const Grid* grid, int64_t first, int64_t rows, bool ones, bool whole = false)
        : call_(call), geometry_(geometry_in_runs(call.weight)), grid_(grid), first_(first), rows_(rows), ones_(ones) {
        const auto& kernel = Kind::multiply();
        direct_ = !whole && rows + ones <= (geometry_.bits == 8 ? kernel.direct_rows_wide : kernel.direct_rows);
        tiles_ = tiles_of(rows + ones, direct_ ? kDirectRows : kPanelRows);
        const int64_t all = rows + ones;
        x_ = prepared.x.get<X>(all * geometry_.padded_k());
        sums_ = prepared.sums.get<Sum>(all * geometry_.groups * geometry_.runs());
        scale_ = prepared.scale.get<float>(all);
        zero_ = prepared.zero.get<int32_t>(all);
        odd_.resize(all);
        const int threads = rows < kSerialRows * call.threads ? 1 : call.threads;
        parallel(all, threads, all * geometry_.k * 4, [&](int64_t i) { odd_[i] = !prepare(i); });
    }

    // Of each row: whether what `multiply` wrote of it cannot be relied on.
    const std::vector<uint8_t>& odd() const { return odd_; }

    void multiply() {
        const int64_t work = call_.weight.n * call_.weight.k * tiles_.rows;
        parallel(geometry_.blocks(), call_.threads, work, [&](int64_t index) {
            Block block = call_.blocks
                              ? block_at(geometry_, call_.blocks, call_.weight.scale_type, call_.weight.zero, index)
                              : lay_out(call_.weight, index, scratch.words.get<uint8_t>(geometry_.word_bytes()),
                                        scratch.scale.get<uint8_t>(geometry_.scale_bytes(call_.weight.scale_type)),
                                        scratch.zero.get<uint8_t>(geometry_.zero_bytes()));
            block.runs = geometry_.runs();
            block.run_steps = geometry_.run_steps();
            float* const y = scratch.y.get<float>(tiles_.rows * kBlockRows);
            direct_ ? direct(block, y) : panel(block, y);
            write(index, y);
        });
    }

private:
    using X = typename Kind::X;
    using Sum = typename Kind::Sum;

    static Geometry geometry_in_runs(const Weight& weight) {
        Geometry geometry = geometry_of(weight);
        geometry.run_codes = Kind::kRun;
        return geometry;
    }

    // Row i in its tile; false where it does not fit its kind.
    bool prepare(int64_t i) {
        const int64_t tile = i / tiles_.height, height = tiles_.height_of(tile), at = i % tiles_.height;
        const int64_t size = geometry_.group_size(), padded = geometry_.padded_group();
        X* const row = scratch.row.get<X>(geometry_.k);
        if (i < rows_) {
            Kind::convert(call_, grid_, first_ + i, row, scale_ + i, zero_ + i);
        } else {
            for (int64_t k = 0; k < geometry_.k; ++k) row[k] = 1;
        }
        X* const to = x_ + tile * tiles_.height * geometry_.padded_k() + at * kStride<Kind>;
        Sum* const sums = sums_ + tile * tiles_.height * geometry_.groups * geometry_.runs() + at;
        for (int64_t p = 0; p < geometry_.groups * geometry_.runs(); ++p) {
            const int64_t g = p / geometry_.runs(), begin = p % geometry_.runs() * Kind::kRun;
            const int64_t count = size - begin < Kind::kRun ? size - begin : Kind::kRun;
            X* const run = to + (g * padded + begin) * height;
            if (begin + count == size)    // what the last step has more
                for (int64_t k = count / 4 * 4; k < padded - begin; k += kStride<Kind>)
                    memset(run + k * height, 0, kStride<Kind> * sizeof(X));
            sums[p * height] = Kind::multiply().place(row + g * size + begin, count, height, run);
        }
        return Kind::fits(row, geometry_.k);
    }

    void direct(const Block& block, float* y) const {
        for (int64_t tile = 0; tile < tiles_.count(); ++tile) {
            const int64_t row = tile * tiles_.height;
            Kind::multiply().direct(block, int(tiles_.height_of(tile)), x_ + row * geometry_.padded_k(),
                                    sums_ + row * geometry_.groups * geometry_.runs(), y + row * kBlockRows);
        }
    }

    void panel(const Block& block, float* y) const {
        const auto& kernel = Kind::multiply();
        memset(y, 0, tiles_.rows * kBlockRows * sizeof(float));
        const int64_t padded = geometry_.padded_group();
        const int64_t groups = kernel.panel_most > padded ? kernel.panel_most / padded : 1;
        uint8_t* const panel = scratch.panel.get<uint8_t>(
            (groups < geometry_.groups ? groups : geometry_.groups) * padded * kernel.panel_bytes);
        for (int64_t g = 0; g < geometry_.groups; g += groups) {
            const int64_t last = g + groups < geometry_.groups ? g + groups : geometry_.groups;
            kernel.expand(block, g, last, panel);
            for (int64_t tile = 0; tile < tiles_.count(); ++tile) {
                const int64_t row = tile * tiles_.height, height = tiles_.height_of(tile);
                kernel.panel(block, panel, g, last, int(height), x_ + row * geometry_.padded_k() + g * padded * height,
                             sums_ + (row * geometry_.groups + g * height) * geometry_.runs(), y + row * kBlockRows);
            }
        }
    }

    void write(int64_t index, float* y) const {
        const int64_t n = call_.weight.n, begin = index * kBlockRows;
        const int64_t width = n - begin < kBlockRows ? n - begin : kBlockRows;
        const float* const ones = y + rows_ * kBlockRows;
        float bias[kBlockRows] = {};
        if (call_.bias.data)
            for (int64_t j = 0; j < width; ++j) bias[j] = load(call_.bias, begin + j);
        for (int64_t i = 0; i < rows_; ++i) {
            float* const row = y + i * kBlockRows;
            if (ones_)
                for (int j = 0; j < kBlockRows; ++j) row[j] -= float(zero_[i]) * ones[j];
            if (Kind::kRounds)
                for (int j = 0; j < kBlockRows; ++j) row[j] *= scale_[i];
            if (call_.bias.data)
                for (int j = 0; j < kBlockRows; ++j) row[j] += bias[j];
            void* const out = const_cast<void*>(row_of({call_.y, call_.x.type}, (first_ + i) * n + begin));
            kernels().store_row(row, call_.x.type, width, out);
        }
    }

    const Linear& call_;
    const Geometry geometry_;
    const Grid* const grid_;
    const int64_t first_, rows_;
    const bool ones_;
    std::vector<uint8_t> odd_;
    bool direct_;
    Tiles tiles_;
    X* x_;
    Sum* sums_;
    float* scale_;
    int32_t* zero_;
};

template <typename Kind>
void in_chunks(const Linear& call, const Grid* grid, bool ones) {
    const Tiles chunks = tiles_of(call.m, kChunkRows);
    for (int64_t i = 0; i < chunks.count(); ++i) {
        const int64_t first = i * chunks.height, rows = chunks.height_of(i);
        Chunk<Kind> chunk(call, grid, first, rows, ones);
        chunk.multiply();
        // Rows that do not fit are multiplied again, among themselves: the others keep the bits that they have without.
        const std::vector<uint8_t>& odd = chunk.odd();
        for (int64_t begin = 0, end; begin < rows; begin = end + 1) {
            while (begin < rows && !odd[begin]) ++begin;
            for (end = begin; end < rows && odd[end];) ++end;
            if (begin < end) Chunk<AsFloat>(call, grid, first + begin, end - begin, false, true).multiply();
        }
    }
}

}  // namespace

void linear(const Linear& call) {
    if (call.x.type == ScaleType::bfloat16 && kernels().bfloat16.direct)
        in_chunks<AsBfloat>(call, nullptr, false);
    else
        in_chunks<AsFloat>(call, nullptr, false);
}

void linear(const Linear& call, const Grid& grid) {
    in_chunks<AsInteger>(call, &grid, grid.scale ? *grid.zero != 0 : grid.kind == GridKind::asymmetric);
}

void quantize_per_token(const Matrix& x, int64_t m, int64_t k, const Grid& grid, int8_t* codes, float* scale,
                        int32_t* zero, int threads) {
    parallel(m, threads, 4 * m * k, [&](int64_t i) {
        float* const row = scratch.y.get<float>(k);
        kernels().load_row(row_of(x, i * k), x.type, k, row);
        kernels().quantize_row(row, k, grid, codes + i * k, scale + i, zero + i);
    });
}

void hadamard(const Matrix& x, void* y, int64_t m, int64_t n, int threads) {
    const float factor = float(1 / sqrt(double(n)));
    parallel(m, threads, 16 * m * n, [&](int64_t i) {
        float* const row = scratch.y.get<float>(n);
        kernels().load_row(row_of(x, i * n), x.type, n, row);
        kernels().hadamard_row(row, n, factor);
        kernels().store_row(row, x.type, n, const_cast<void*>(row_of({y, x.type}, i * n)));
    });
}

}  // namespace remanence
