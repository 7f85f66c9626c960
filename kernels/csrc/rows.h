// The kernels on whole matrices: which instruction set is used, and the parallel loops over output rows.
// Every output row is the work of one thread, so no result depends on the number of threads.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

namespace remanence {

std::string isa();                            // the widest this machine has, unless use_isa chose another
std::vector<std::string> available_isas();    // narrowest first
bool use_isa(const std::string& name);        // false: this machine does not have it

enum class ScaleType : int { float32 = 0, float16 = 1, bfloat16 = 2 };    // of x, bias and y, too

// Shapes and layout as in isa.h; the caller (ops.py) has checked them.
struct Weight {
    const uint8_t* packed;
    const void* scale;
    ScaleType scale_type;
    const uint8_t* zero;
    int64_t n, k, groups;
    int bits;
};

void pack(const uint8_t* codes, uint8_t* packed, int64_t n, int64_t k, int bits, int threads);
void unpack(const uint8_t* packed, uint8_t* codes, int64_t n, int64_t k, int bits, int threads);
void dequantize(const Weight& weight, float* w, int threads);

}  // namespace remanence
