// The inner loops of calibration. gptq_block: in rows of a weight, one column is rounded and the later ones make up for
// its error. clip_error: what rounding a group costs on each of many grids.
#pragma once

#include <stdint.h>

namespace remanence {

// Shapes: N rows, B columns that are rounded one after another, G scales a row; ops.py has checked them.
struct GptqBlock {
    const float* running;    // [N, B], `stride` floats from row to row
    int64_t stride;
    const float* upper;      // [B, B], read from the diagonal on
    const float* scale;      // [N, G]
    const uint8_t* zero;     // [N, G] in code units, or null: 2^(bits-1)
    const int64_t* group;    // [B], each column's scale
    const uint8_t* kept;     // [N, B], 0 where the weight is to be zero, or null: nowhere
    const float* push;       // [B, B], read above the diagonal, or null
    uint8_t* codes;          // [N, B], written
    float* errors;           // [N, B], written
    int64_t n, b, groups;
    int bits;
};

// Shapes: M groups of G weights, S grids for each.
struct ClipError {
    const float* w;          // [M, G]
    const float* scale;      // [M, S]
    const uint8_t* zero;     // [M, S] in code units, or null: 2^(bits-1)
    float* error;            // [M, S], written: sum of |(code - zero) * scale - w|^2.4
    int64_t m, g, s;
    int bits;
};

constexpr int kMostLanes = 16;

// What one instruction set provides.
struct GptqKernels {
    int lanes;    // rows (gptq) or grids (clip) worked on at once, one in each lane of a vector
    // Rows first .. first + count - 1, count <= lanes; scratch: lanes * B floats, aligned as kMostLanes of them.
    void (*gptq_rows)(const GptqBlock& block, int64_t first, int count, float* scratch);
    // Group m.
    void (*clip_row)(const ClipError& clip, int64_t m);
};

extern const GptqKernels gptq_scalar;
#ifdef REMANENCE_X86
extern const GptqKernels gptq_avx2;
extern const GptqKernels gptq_avx512;
#endif

void gptq_block(const GptqBlock& block, int threads);
void clip_error(const ClipError& clip, int threads);

}  // namespace remanence
