// What the machine gives at best, measured with the instructions that the kernels use: the limits they are held against.
#pragma once

#include <stdint.h>

namespace remanence {

// Bytes a second that `threads` threads read together, each its part of `bytes` bytes; the best of `repeats`.
double read_bandwidth(int64_t bytes, int threads, int repeats);

enum class Arithmetic : int { float32 = 0, int8 = 1, bfloat16 = 2 };

// Operations (a multiplication and an addition are two) a second of all threads; 0 where the arithmetic is not there.
double peak(Arithmetic kind, int threads, int repeats);

}  // namespace remanence
