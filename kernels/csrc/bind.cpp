// The Python face of the native kernels: addresses (data_ptr()) and sizes, nothing is checked here.
// ops.py checks shapes, dtypes and contiguity; the GIL is released while a kernel runs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "gptq.h"
#include "rows.h"

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

void linear(uintptr_t x, uintptr_t packed, uintptr_t scale, int scale_type, uintptr_t zero, uintptr_t bias,
            uintptr_t y, int64_t m, int64_t n, int64_t k, int64_t groups, int bits, int threads) {
    remanence::linear(at<const float>(x), weight_at(packed, scale, scale_type, zero, n, k, groups, bits),
                      at<const float>(bias), at<float>(y), m, threads);
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
    m.def("linear", &linear, "x"_a, "packed"_a, "scale"_a, "scale_type"_a, "zero"_a, "bias"_a, "y"_a, "m"_a, "n"_a,
          "k"_a, "groups"_a, "bits"_a, "threads"_a, release, "As dequantize; bias: 0 for none.");
    m.def("gptq_block", &gptq_block, "running"_a, "stride"_a, "upper"_a, "scale"_a, "zero"_a, "group"_a, "kept"_a,
          "push"_a, "codes"_a, "errors"_a, "n"_a, "b"_a, "groups"_a, "bits"_a, "threads"_a, release,
          "zero, kept, push: 0 for none.");
    m.def("clip_error", &clip_error, "w"_a, "scale"_a, "zero"_a, "error"_a, "m"_a, "g"_a, "s"_a, "bits"_a,
          "threads"_a, release, "zero: 0 for none.");
}
