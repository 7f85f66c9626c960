// The Python face of the native kernels: addresses (data_ptr()) and sizes, nothing is checked here.
// ops.py checks shapes, dtypes and contiguity; the GIL is released while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "blocks.h"
#include "gptq.h"
#include "linear.h"
#include "pages.h"
#include "probe.h"
#include "rows.h"
#include "sparse24.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

remanence::Weight weight_at(uintptr_t packed, uintptr_t scale, int scale_type, uintptr_t zero, int64_t n, int64_t k,
                            int64_t groups, int bits) {
    return {at<const uint8_t>(packed), at<const void>(scale), remanence::ScaleType(scale_type),
            at<const uint8_t>(zero),   n, k, groups, bits};
}

void pack(uintptr_t codes, uintptr_t packed, int64_t n, int64_t k, int bits, int threads) {
    remanence::pack(at<const uint8_t>(codes), at<uint8_t>(packed), n, k, bits, threads);
}

void unpack(uintptr_t packed, uintptr_t codes, int64_t n, int64_t k, int bits, int threads) {
    remanence::unpack(at<const uint8_t>(packed), at<uint8_t>(codes), n, k, bits, threads);
}

void dequantize(uintptr_t packed, uintptr_t scale, int scale_type, uintptr_t zero, uintptr_t w, int64_t n, int64_t k,
                int64_t groups, int bits, int threads) {
    remanence::dequantize(weight_at(packed, scale, scale_type, zero, n, k, groups, bits), at<float>(w), threads);
}

void prepack(uintptr_t packed, uintptr_t scale, int scale_type, uintptr_t zero, uintptr_t blocks, int64_t n, int64_t k,
             int64_t groups, int bits, int threads) {
    remanence::prepack(weight_at(packed, scale, scale_type, zero, n, k, groups, bits), at<uint8_t>(blocks), threads);
}

void unprepack(uintptr_t blocks, uintptr_t packed, uintptr_t scale, int scale_type, uintptr_t zero, int64_t n,
               int64_t k, int64_t groups, int bits, int threads) {
    remanence::unprepack(at<const uint8_t>(blocks), weight_at(packed, scale, scale_type, zero, n, k, groups, bits),
                         at<uint8_t>(packed), at<void>(scale), at<uint8_t>(zero), threads);
}

void dequantize_blocks(uintptr_t blocks, int scale_type, bool zero, uintptr_t w, int64_t n, int64_t k, int64_t groups,
                       int bits, int threads) {
    remanence::dequantize_blocks(at<const uint8_t>(blocks), weight_at(0, 0, scale_type, zero, n, k, groups, bits),
                                 at<float>(w), threads);
}

remanence::Linear linear_at(uintptr_t x, int type, uintptr_t blocks, const remanence::Weight& weight, uintptr_t bias,
                            int bias_type, uintptr_t y, int64_t m, int threads) {
    return {{at<const void>(x), remanence::ScaleType(type)},
            at<const uint8_t>(blocks),
            weight,
            {at<const void>(bias), remanence::ScaleType(bias_type)},
            at<void>(y),
            m,
            threads};
}

void linear(uintptr_t x, int type, uintptr_t blocks, uintptr_t packed, uintptr_t scale, int scale_type, uintptr_t zero,
            uintptr_t bias, int bias_type, uintptr_t y, int64_t m, int64_t n, int64_t k, int64_t groups, int bits,
            int threads) {
    const remanence::Weight weight = weight_at(packed, scale, scale_type, zero, n, k, groups, bits);
    remanence::linear(linear_at(x, type, blocks, weight, bias, bias_type, y, m, threads));
}

remanence::Grid grid_at(int bits, int kind, float clip, uintptr_t scale, uintptr_t zero) {
    return {bits, remanence::GridKind(kind), clip, at<const float>(scale), at<const int32_t>(zero)};
}

void integer_linear(uintptr_t x, int type, uintptr_t blocks, uintptr_t packed, uintptr_t scale, int scale_type,
                    uintptr_t zero, uintptr_t bias, int bias_type, uintptr_t y, int64_t m, int64_t n, int64_t k,
                    int64_t groups, int bits, int x_bits, int grid, float clip, uintptr_t x_scale,
                    uintptr_t x_zero, int threads) {
    const remanence::Weight weight = weight_at(packed, scale, scale_type, zero, n, k, groups, bits);
    remanence::linear(linear_at(x, type, blocks, weight, bias, bias_type, y, m, threads),
                      grid_at(x_bits, grid, clip, x_scale, x_zero));
}

void quantize_per_token(uintptr_t x, int type, int64_t m, int64_t k, int bits, int grid, float clip,
                        uintptr_t codes, uintptr_t scale, uintptr_t zero, int threads) {
    remanence::quantize_per_token({at<const void>(x), remanence::ScaleType(type)}, m, k,
                                  grid_at(bits, grid, clip, 0, 0), at<int8_t>(codes), at<float>(scale),
                                  at<int32_t>(zero), threads);
}

void hadamard(uintptr_t x, int type, uintptr_t y, int64_t m, int64_t n, int threads) {
    remanence::hadamard({at<const void>(x), remanence::ScaleType(type)}, at<void>(y), m, n, threads);
}

void gptq_block(uintptr_t running, int64_t stride, uintptr_t upper, uintptr_t scale, uintptr_t zero, uintptr_t group,
                uintptr_t kept, uintptr_t push, uintptr_t codes, uintptr_t errors, int64_t n, int64_t b,
                int64_t groups, int bits, int threads) {
    remanence::gptq_block({at<const float>(running), stride, at<const float>(upper), at<const float>(scale),
                           at<const uint8_t>(zero), at<const int64_t>(group), at<const uint8_t>(kept),
                           at<const float>(push), at<uint8_t>(codes), at<float>(errors), n, b, groups, bits},
                          threads);
}

void clip_error(uintptr_t w, uintptr_t scale, uintptr_t zero, uintptr_t error, int64_t m, int64_t g, int64_t s,
                int bits, int threads) {
    remanence::clip_error({at<const float>(w), at<const float>(scale), at<const uint8_t>(zero), at<float>(error), m,
                           g, s, bits},
                          threads);
}

void large_pages(uintptr_t memory, int64_t bytes) { remanence::large_pages(at<void>(memory), bytes); }

remanence::Sparse24 sparse24_at(uintptr_t values, int type, uintptr_t bitmask, int64_t n, int64_t k) {
    return {at<const void>(values), remanence::ScaleType(type), at<const uint8_t>(bitmask), n, k};
}

void sparse24_linear(uintptr_t x, int type, uintptr_t values, int value_type, uintptr_t bitmask, uintptr_t bias,
                     int bias_type, uintptr_t y, int64_t m, int64_t n, int64_t k, int threads) {
    remanence::sparse24_linear({at<const void>(x), remanence::ScaleType(type)},
                               sparse24_at(values, value_type, bitmask, n, k),
                               {at<const void>(bias), remanence::ScaleType(bias_type)}, at<void>(y), m, threads);
}

void expand24(uintptr_t values, int value_type, uintptr_t bitmask, uintptr_t w, int64_t n, int64_t k, int threads) {
    remanence::expand24(sparse24_at(values, value_type, bitmask, n, k), at<float>(w), threads);
}

double peak(int kind, int threads, int repeats) { return remanence::peak(remanence::Arithmetic(kind), threads, repeats); }

void set_isa(const std::string& name) {
    if (remanence::use_isa(name)) return;
    std::string known;
    for (const std::string& other : remanence::available_isas()) known += (known.empty() ? "" : ", ") + other;
    throw nb::value_error(("isa: '" + name + "' is not one of " + known + " (what this machine has)").c_str());
}

}  // namespace

NB_MODULE(_C, m) {
    const auto release = nb::call_guard<nb::gil_scoped_release>();
    m.def("isa", &remanence::isa, "Name of the instruction set in use.");
    m.def("available_isas", &remanence::available_isas, "What this machine can run, narrowest first.");
    m.def("set_isa", &set_isa, "name"_a, "Use this one from now on; ValueError if this machine lacks it.");
    m.def("pack", &pack, "codes"_a, "packed"_a, "n"_a, "k"_a, "bits"_a, "threads"_a, release);
    m.def("unpack", &unpack, "packed"_a, "codes"_a, "n"_a, "k"_a, "bits"_a, "threads"_a, release);
    m.def("dequantize", &dequantize, "packed"_a, "scale"_a, "scale_type"_a, "zero"_a, "w"_a, "n"_a, "k"_a,
          "groups"_a, "bits"_a, "threads"_a, release,
          "scale_type: 0 float32, 1 float16, 2 bfloat16; zero: 0 for none.");
    m.def("prepack", &prepack, "packed"_a, "scale"_a, "scale_type"_a, "zero"_a, "blocks"_a, "n"_a, "k"_a, "groups"_a,
          "bits"_a, "threads"_a, release);
    m.def("unprepack", &unprepack, "blocks"_a, "packed"_a, "scale"_a, "scale_type"_a, "zero"_a, "n"_a, "k"_a,
          "groups"_a, "bits"_a, "threads"_a, release);
    m.def("dequantize_blocks", &dequantize_blocks, "blocks"_a, "scale_type"_a, "zero"_a, "w"_a, "n"_a, "k"_a,
          "groups"_a, "bits"_a, "threads"_a, release);
    m.def("linear", &linear, "x"_a, "type"_a, "blocks"_a, "packed"_a, "scale"_a, "scale_type"_a, "zero"_a, "bias"_a,
          "bias_type"_a, "y"_a, "m"_a, "n"_a, "k"_a, "groups"_a, "bits"_a, "threads"_a, release,
          "blocks: 0 for a stored weight; with blocks, packed and scale are not read, and zero says if there is one. "
          "bias: 0 for none; types as scale_type.");
    m.def("integer_linear", &integer_linear, "x"_a, "type"_a, "blocks"_a, "packed"_a, "scale"_a, "scale_type"_a,
          "zero"_a, "bias"_a, "bias_type"_a, "y"_a, "m"_a, "n"_a, "k"_a, "groups"_a, "bits"_a, "x_bits"_a,
          "grid"_a, "clip"_a, "x_scale"_a, "x_zero"_a, "threads"_a, release,
          "As linear; x_scale and x_zero: 0 for a grid of each row's own.");
    m.def("quantize_per_token", &quantize_per_token, "x"_a, "type"_a, "m"_a, "k"_a, "bits"_a, "grid"_a, "clip"_a,
          "codes"_a, "scale"_a, "zero"_a, "threads"_a, release);
    m.def("hadamard", &hadamard, "x"_a, "type"_a, "y"_a, "m"_a, "n"_a, "threads"_a, release);
    m.def("large_pages", &large_pages, "memory"_a, "bytes"_a, "Before it is written: a wish that may not be granted.");
    m.def("sparse24_linear", &sparse24_linear, "x"_a, "type"_a, "values"_a, "value_type"_a, "bitmask"_a, "bias"_a,
          "bias_type"_a, "y"_a, "m"_a, "n"_a, "k"_a, "threads"_a, release, "bias: 0 for none; types as scale_type.");
    m.def("expand24", &expand24, "values"_a, "value_type"_a, "bitmask"_a, "w"_a, "n"_a, "k"_a, "threads"_a, release);
    m.def("read_bandwidth", &remanence::read_bandwidth, "bytes"_a, "threads"_a, "repeats"_a, release,
          "Bytes a second, the best of some reads.");
    m.def("peak", &peak, "kind"_a, "threads"_a, "repeats"_a, release,
          "Operations a second; kind: 0 float32, 1 int8, 2 bfloat16 (0 where it has no instructions).");
    m.def("gptq_block", &gptq_block, "running"_a, "stride"_a, "upper"_a, "scale"_a, "zero"_a, "group"_a, "kept"_a,
          "push"_a, "codes"_a, "errors"_a, "n"_a, "b"_a, "groups"_a, "bits"_a, "threads"_a, release,
          "zero, kept, push: 0 for none.");
    m.def("clip_error", &clip_error, "w"_a, "scale"_a, "zero"_a, "error"_a, "m"_a, "g"_a, "s"_a, "bits"_a,
          "threads"_a, release, "zero: 0 for none.");
}
