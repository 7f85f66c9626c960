// The kernels without Python, for sanitizers and emulators: every op on every instruction set of this machine, on odd
// shapes, from buffers that end where their last number does, against loops in double. Exits with 1 on a mismatch.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "../../../kernels/csrc/gptq.h"
#include "../../../kernels/csrc/halves.h"
#include "../../../kernels/csrc/linear.h"
#include "../../../kernels/csrc/rows.h"
#include "../../../kernels/csrc/sparse24.h"

using namespace remanence;

namespace {

int failures = 0;
long checks = 0;
std::string where;    // the case that runs

void expect(bool ok, const char* what, int64_t at, double found, double exact) {
    ++checks;
    if (ok) return;
    if (++failures <= 20) fprintf(stderr, "%s: %s [%lld] is %.9g, not %.9g\n", where.c_str(), what, (long long)at, found, exact);
}

uint64_t state = 1;

uint32_t draw() {    // xorshift
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return uint32_t(state >> 32);
}

double uniform() { return draw() / 4294967296.0; }

// Memory of its own for exactly `count` numbers: a sanitizer sees what is read beyond. Not written: 0xff, NaN.
template <typename T>
struct Exact {
    std::unique_ptr<void, void (*)(void*)> memory;
    int64_t count;

    explicit Exact(int64_t n) : memory(malloc(n * sizeof(T)), free), count(n) { memset(memory.get(), 0xff, n * sizeof(T)); }
    T* data() { return static_cast<T*>(memory.get()); }
    T& operator[](int64_t i) { return data()[i]; }
};

// Numbers of one of the three types.
struct Floats {
    Exact<uint8_t> bytes;
    ScaleType type;

    Floats(int64_t n, ScaleType t) : bytes(n * (t == ScaleType::float32 ? 4 : 2)), type(t) {}
    void* data() { return bytes.data(); }
    double at(int64_t i) { return load_scale_at(bytes.data(), type, i); }
    void set(int64_t i, double value) {
        const float v = float(value);
        const uint16_t half = type == ScaleType::float16 ? to_half(v) : to_bfloat(v);
        if (type == ScaleType::float32)
            memcpy(bytes.data() + 4 * i, &v, 4);
        else
            memcpy(bytes.data() + 2 * i, &half, 2);
    }
};

// Half a unit in the last place, of the largest number.
double rounding(ScaleType type) {
    return type == ScaleType::float32 ? 0x1p-24 : type == ScaleType::float16 ? 0x1p-11 : 0x1p-8;
}

struct Case {
    int64_t n, k, groups;
    int bits;
    bool asymmetric;
    ScaleType scale_type, x_type;
    int threads;
};

struct Layer {
    Case c;
    Exact<uint8_t> codes, packed, zero, blocks;
    Floats scale, bias;
    std::vector<double> w;    // [N, K]
    Weight weight;

    explicit Layer(const Case& given)
        : c(given),
          codes(c.n * c.k),
          packed(c.n * packed_width(c.k, c.bits)),
          zero(c.asymmetric ? c.n * c.groups : 0),
          blocks(Geometry{c.n, c.k, c.groups, c.bits}.blocks() *
                 Geometry{c.n, c.k, c.groups, c.bits}.block_bytes(c.scale_type, c.asymmetric)),
          scale(c.n * c.groups, c.scale_type),
          bias(c.n, c.x_type),
          w(c.n * c.k) {
        for (int64_t i = 0; i < codes.count; ++i) codes[i] = uint8_t(draw() % (1 << c.bits));
        for (int64_t i = 0; i < zero.count; ++i) zero[i] = uint8_t(draw() % (1 << c.bits));
        for (int64_t i = 0; i < c.n * c.groups; ++i) scale.set(i, 0.01 + uniform());
        for (int64_t i = 0; i < c.n; ++i) bias.set(i, uniform() - 0.5);
        const int64_t size = c.k / c.groups;
        for (int64_t i = 0; i < c.n * c.k; ++i) {
            const int64_t g = i / c.k * c.groups + i % c.k / size;
            w[i] = (codes[i] - (c.asymmetric ? zero[g] : 1 << (c.bits - 1))) * scale.at(g);
        }
        pack(codes.data(), packed.data(), c.n, c.k, c.bits, c.threads);
        weight = {packed.data(), scale.data(), c.scale_type, c.asymmetric ? zero.data() : nullptr, c.n, c.k, c.groups, c.bits};
        prepack(weight, blocks.data(), c.threads);
    }
};

void same(const char* what, const void* found, const void* exact, int64_t bytes) {
    expect(bytes == 0 || memcmp(found, exact, bytes) == 0, what, bytes, 0, 0);
}

void layouts(Layer& layer) {
    const Case& c = layer.c;
    Exact<uint8_t> codes(c.n * c.k), packed(layer.packed.count), zero(layer.zero.count);
    Floats scale(c.n * c.groups, c.scale_type);
    unpack(layer.packed.data(), codes.data(), c.n, c.k, c.bits, c.threads);
    same("unpack", codes.data(), layer.codes.data(), codes.count);
    unprepack(layer.blocks.data(), layer.weight, packed.data(), scale.data(), c.asymmetric ? zero.data() : nullptr, c.threads);
    same("unprepack: packed", packed.data(), layer.packed.data(), packed.count);
    same("unprepack: scale", scale.data(), layer.scale.data(), scale.bytes.count);
    same("unprepack: zero", zero.data(), layer.zero.data(), zero.count);
    for (const bool prepacked : {false, true}) {
        Exact<float> w(c.n * c.k);
        prepacked ? dequantize_blocks(layer.blocks.data(), layer.weight, w.data(), c.threads)
                  : dequantize(layer.weight, w.data(), c.threads);
        for (int64_t i = 0; i < w.count; ++i) expect(w[i] == float(layer.w[i]), "dequantize", i, w[i], layer.w[i]);
    }
}

// y [m, N] of x [m, K] in double. `magnitude`: what the rounding errors of a row are measured by.
void naive(const Layer& layer, const std::vector<double>& x, int64_t i, int64_t n, double& y, double& magnitude) {
    y = magnitude = 0;
    for (int64_t k = 0; k < layer.c.k; ++k) {
        y += x[i * layer.c.k + k] * layer.w[n * layer.c.k + k];
        magnitude += fabs(x[i * layer.c.k + k]);
    }
}

void products(Layer& layer, int64_t m, int odd_row) {
    const Case& c = layer.c;
    Floats x(m * c.k, c.x_type);
    for (int64_t i = 0; i < m * c.k; ++i) x.set(i, 2 * uniform() - 1);
    if (odd_row >= 0) x.set(odd_row * c.k + c.k - 1, INFINITY);
    // The rounding errors of some hundred sums in float32, of codes with up to 2048 + 128 added to them (bfloat16).
    const double tolerance = 1.01 * 2400 * 0x1p-21;
    std::vector<uint8_t> first;
    for (const bool prepacked : {false, true}) {
        Floats y(m * c.n, c.x_type);
        const Linear call = {{x.data(), c.x_type}, prepacked ? layer.blocks.data() : nullptr, layer.weight,
                             {layer.bias.data(), c.x_type}, y.data(), m, c.threads};
        linear(call);
        if (prepacked) same("linear: prepacked", y.data(), first.data(), y.bytes.count);
        first.assign(y.bytes.data(), y.bytes.data() + y.bytes.count);
        if (prepacked) continue;
        std::vector<double> exact_x(m * c.k);
        for (int64_t i = 0; i < m * c.k; ++i) exact_x[i] = x.at(i);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t n = 0; n < c.n; ++n) {
                const double found = y.at(i * c.n + n);
                if (i == odd_row) {
                    expect(!isfinite(found), "linear: infinite x", i * c.n + n, found, INFINITY);
                    continue;
                }
                double exact, magnitude;
                naive(layer, exact_x, i, n, exact, magnitude);
                exact += layer.bias.at(n);
                expect(fabs(found - exact) <= tolerance * magnitude + 1.01 * rounding(c.x_type) * fabs(exact), "linear",
                       i * c.n + n, found, exact);
            }
    }
}

void integer_products(Layer& layer, int64_t m, int x_bits, GridKind kind, bool given) {
    const Case& c = layer.c;
    Floats x(m * c.k, c.x_type);
    for (int64_t i = 0; i < m * c.k; ++i) x.set(i, 4 * uniform() - 1);
    Exact<float> step(1), scales(m);
    Exact<int32_t> shift(1), zeros(m);
    Exact<int8_t> codes(m * c.k);
    step[0] = 0.03f;
    shift[0] = kind == GridKind::asymmetric ? -3 : 0;
    const Grid own = {x_bits, kind, 0.9f, nullptr, nullptr};
    const Grid grid = {x_bits, kind, 0.9f, given ? step.data() : nullptr, given ? shift.data() : nullptr};
    quantize_per_token({x.data(), c.x_type}, m, c.k, given ? grid : own, codes.data(), scales.data(), zeros.data(), c.threads);
    const double most = (1 << (x_bits - 1)) - 1, least = !given && kind == GridKind::narrow ? -most : -most - 1;
    std::vector<double> exact_x(m * c.k);
    for (int64_t i = 0; i < m * c.k; ++i) {
        const int64_t row = i / c.k;
        double code = nearbyint(x.at(i) / scales[row] + zeros[row]);
        code = code < least ? least : code > most ? most : code;
        // One code off where float32 and double round a tie apart.
        expect(fabs(codes[i] - code) <= 1, "quantize_per_token", i, codes[i], code);
        exact_x[i] = (codes[i] - zeros[row]) * double(scales[row]);
    }
    std::vector<uint8_t> first;
    for (const bool prepacked : {false, true}) {
        Floats y(m * c.n, c.x_type);
        const Linear call = {{x.data(), c.x_type}, prepacked ? layer.blocks.data() : nullptr, layer.weight,
                             {nullptr, ScaleType::float32}, y.data(), m, c.threads};
        linear(call, grid);
        if (prepacked) same("integer linear: prepacked", y.data(), first.data(), y.bytes.count);
        first.assign(y.bytes.data(), y.bytes.data() + y.bytes.count);
        if (prepacked) continue;
        for (int64_t i = 0; i < m * c.n; ++i) {
            double exact, magnitude;
            naive(layer, exact_x, i / c.n, i % c.n, exact, magnitude);
            // Exact integers in a group; across groups, and of the zero point's share, some roundings of float32.
            const double tolerance = 0x1p-20 * (magnitude + c.k * double(scales[i / c.n]) * 256) * (1 << c.bits);
            expect(fabs(y.at(i) - exact) <= tolerance + 1.01 * rounding(c.x_type) * fabs(exact), "integer linear", i,
                   y.at(i), exact);
        }
    }
}

void hadamards(ScaleType type, int64_t n, int threads) {
    const int64_t m = 3;
    Floats x(m * n, type), y(m * n, type);
    for (int64_t i = 0; i < m * n; ++i) x.set(i, 2 * uniform() - 1);
    hadamard({x.data(), type}, y.data(), m, n, threads);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
            double exact = 0;
            for (int64_t k = 0; k < n; ++k) exact += (__builtin_parityll(j & k) ? -1 : 1) * x.at(i * n + k);
            exact /= sqrt(double(n));
            // log2(n) sums of float32, of numbers below sqrt(n).
            const double tolerance = 64 * 0x1p-24 * sqrt(double(n)) + 1.01 * rounding(type) * fabs(exact);
            expect(fabs(y.at(i * n + j) - exact) <= tolerance, "hadamard", i * n + j, y.at(i * n + j), exact);
        }
}

// One column of a block at a time, in double; codes may differ by one where a tie falls the other way, and do not here.
void gptq(int64_t n, int64_t b, int64_t groups, bool all, int threads) {
    Exact<float> running(n * b), upper(b * b), scale(n * groups), push(b * b), errors(n * b);
    Exact<uint8_t> zero(n * groups), kept(n * b), codes(n * b);
    Exact<int64_t> group(b);
    for (int64_t i = 0; i < n * b; ++i) running[i] = float(2 * uniform() - 1), kept[i] = draw() % 2;
    for (int64_t i = 0; i < b * b; ++i) upper[i] = i / b == i % b ? 1 : 0.01f, push[i] = 0.01f;
    for (int64_t i = 0; i < n * groups; ++i) scale[i] = float(0.1 + uniform()), zero[i] = uint8_t(draw() % 16);
    for (int64_t i = 0; i < b; ++i) group[i] = draw() % groups;
    const GptqBlock block = {running.data(), b, upper.data(), scale.data(), all ? zero.data() : nullptr, group.data(),
                             all ? kept.data() : nullptr, all ? push.data() : nullptr, codes.data(), errors.data(),
                             n, b, groups, 4};
    gptq_block(block, threads);
    for (int64_t r = 0; r < n; ++r) {
        std::vector<double> w(b);
        for (int64_t i = 0; i < b; ++i) w[i] = running[r * b + i];
        for (int64_t i = 0; i < b; ++i) {
            const int64_t g = r * groups + group[i];
            const double middle = all ? zero[g] : 8, error = w[i] - (codes[r * b + i] - middle) * double(scale[g]);
            double code = nearbyint(w[i] / scale[g]) + middle;
            code = all && !kept[r * b + i] ? middle : code < 0 ? 0 : code > 15 ? 15 : code;
            expect(fabs(code - codes[r * b + i]) <= 1, "gptq_block: code", r * b + i, codes[r * b + i], code);
            expect(fabs(error - errors[r * b + i]) <= 1e-4, "gptq_block: error", r * b + i, errors[r * b + i], error);
            const double old = w[i];
            for (int64_t j = i + 1; j < b; ++j) w[j] -= error * 0.01f - (all ? old * 0.01f : 0);
        }
    }
}

void clips(int64_t m, int64_t g, int64_t s, bool asymmetric, int threads) {
    Exact<float> w(m * g), scale(m * s), error(m * s);
    Exact<uint8_t> zero(asymmetric ? m * s : 0);
    for (int64_t i = 0; i < w.count; ++i) w[i] = float(2 * uniform() - 1);
    for (int64_t i = 0; i < scale.count; ++i) scale[i] = float(0.05 + 0.2 * uniform());
    for (int64_t i = 0; i < zero.count; ++i) zero[i] = uint8_t(draw() % 16);
    clip_error({w.data(), scale.data(), asymmetric ? zero.data() : nullptr, error.data(), m, g, s, 4}, threads);
    for (int64_t i = 0; i < m * s; ++i) {
        const double middle = asymmetric ? zero[i] : 8, step = scale[i];
        double exact = 0;
        for (int64_t k = 0; k < g; ++k) {
            double code = nearbyint(w[i / s * g + k] / step) + middle;
            code = code < 0 ? 0 : code > 15 ? 15 : code;
            exact += pow(fabs((code - middle) * step - w[i / s * g + k]), 2.4);
        }
        expect(fabs(error[i] - exact) <= 1e-5 * exact + 1e-30, "clip_error", i, error[i], exact);
    }
}

// A 2:4 weight; with `wrong`, whose bitmask marks anything, for what a sanitizer sees.
void sparse24(int64_t n, int64_t k, ScaleType type, ScaleType x_type, bool wrong, int threads) {
    Floats values(n * k / 2, type), bias(n, x_type);
    Exact<uint8_t> bitmask(n * ((k + 7) / 8));
    std::vector<double> w(n * k);
    memset(bitmask.data(), 0, bitmask.count);
    for (int64_t i = 0; i < n * k / 2; ++i) values.set(i, 2 * uniform() - 1);
    for (int64_t i = 0; i < n * k; i += 4) {
        const int first = int(draw() % 3), second = first + 1 + int(draw() % (3 - first));
        for (const int at : {first, second}) {
            const int64_t row = i / k, feature = i % k + at;
            bitmask[row * ((k + 7) / 8) + feature / 8] |= uint8_t(1 << feature % 8);
            w[i + at] = values.at(i / 2 + (at == second));
        }
    }
    for (int64_t i = 0; i < n; ++i) bias.set(i, uniform() - 0.5);
    if (wrong)
        for (int64_t i = 0; i < bitmask.count; ++i) bitmask[i] = i % 5 ? uint8_t(draw()) : 0xff;
    const Sparse24 weight = {values.data(), type, bitmask.data(), n, k};
    Exact<float> dense(n * k);
    expand24(weight, dense.data(), threads);
    if (!wrong)
        for (int64_t i = 0; i < n * k; ++i) expect(dense[i] == float(w[i]), "expand24", i, dense[i], w[i]);
    for (const int64_t m : {0, 1, 2, 3, 4, 5, 9}) {
        Floats x(m * k, x_type), y(m * n, x_type);
        for (int64_t i = 0; i < m * k; ++i) x.set(i, 2 * uniform() - 1);
        sparse24_linear({x.data(), x_type}, weight, {bias.data(), x_type}, y.data(), m, threads);
        for (int64_t i = 0; i < m * n && !wrong; ++i) {
            double exact = bias.at(i % n), magnitude = fabs(exact);
            for (int64_t j = 0; j < k; ++j) {
                exact += x.at(i / n * k + j) * w[i % n * k + j];
                magnitude += fabs(x.at(i / n * k + j));
            }
            const double limit = rounding(x_type) * fabs(exact) + 4e-6 * magnitude;
            expect(fabs(y.at(i) - exact) <= limit, "sparse24_linear", i, y.at(i), exact);
        }
    }
}

}  // namespace

int main() {
    const int64_t shapes[][3] = {{1, 1, 1}, {3, 63, 21}, {64, 64, 2}, {65, 129, 3}, {63, 86, 2}, {130, 320, 10}};
    const ScaleType types[] = {ScaleType::float32, ScaleType::float16, ScaleType::bfloat16};
    for (const std::string& isa : available_isas()) {
        if (!use_isa(isa)) return 2;
        int turn = 0;
        for (const int bits : {2, 3, 4, 8})
            for (const auto& shape : shapes)
                for (const ScaleType x_type : types) {
                    ++turn;
                    const Case c = {shape[0], shape[1], shape[2], bits, turn % 2 == 0, types[turn / 2 % 3], x_type, 1 + turn % 4};
                    where = isa + " bits " + std::to_string(bits) + " n " + std::to_string(c.n) + " k " + std::to_string(c.k) +
                            " groups " + std::to_string(c.groups) + " x type " + std::to_string(int(x_type)) +
                            " scale type " + std::to_string(int(c.scale_type)) + (c.asymmetric ? " asymmetric" : "") +
                            " threads " + std::to_string(c.threads);
                    Layer layer(c);
                    layouts(layer);
                    for (const int64_t m : {0, 1, 2, 3, 4, 5, 6, 7, 19}) products(layer, m, -1);
                    products(layer, 1, 0);
                    products(layer, 7, 5);
                    int kind = turn;
                    for (const int64_t m : {0, 1, 4, 5, 7, 13, 19}) {
                        ++kind;
                        integer_products(layer, m, kind % 3 ? 8 : 4, GridKind(kind % 5 % 3), kind % 4 == 0);
                    }
                }
        where = isa + " more than a chunk";
        Layer tall({66, 66, 3, 4, true, ScaleType::bfloat16, ScaleType::bfloat16, 3});
        products(tall, 243, 241);
        integer_products(tall, 243, 8, GridKind::asymmetric, false);
        where = isa + " runs";    // a group of more than 32768 features
        Layer wide({2, 32768 + 35, 1, 8, true, ScaleType::float32, ScaleType::bfloat16, 2});
        for (const int64_t m : {1, 9, 18}) products(wide, m, -1), integer_products(wide, m, 8, GridKind::asymmetric, false);
        for (const ScaleType type : types)
            for (const int64_t n : {1, 2, 8, 64, 1024}) where = isa + " hadamard", hadamards(type, n, 3);
        for (const auto& [n, k] : {std::pair<int, int>{1, 4}, {3, 8}, {17, 12}, {65, 60}, {34, 324}})
            for (const ScaleType type : types)
                for (const ScaleType x_type : types)
                    for (const bool wrong : {false, true}) {
                        where = isa + " 2:4, n " + std::to_string(n) + " k " + std::to_string(k) + " type " +
                                std::to_string(int(type)) + " x type " + std::to_string(int(x_type));
                        sparse24(n, k, type, x_type, wrong, 1 + n % 3);
                    }
        for (const int threads : {1, 3}) {
            where = isa + " gptq";
            gptq(1, 1, 1, false, threads);
            gptq(19, 63, 3, false, threads);
            gptq(33, 40, 5, true, threads);
            clips(3, 63, 17, true, threads);
            clips(65, 64, 16, false, threads);
        }
    }
    std::string names;
    for (const std::string& isa : available_isas()) names += " " + isa;
    printf("%ld checks, %d failures on%s\n", checks, failures, names.c_str());
    return failures != 0;
}
