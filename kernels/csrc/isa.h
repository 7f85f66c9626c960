// What one instruction set provides, in a table: functions on a row of the stored layout, and on a block of the run-time
// layout (blocks.h).
//
// Layout of a stored weight with N output rows, K input features, G groups a row and `bits` a code:
//   codes  uint8 [N, K]                     0 .. 2^bits - 1, one byte each
//   packed uint8 [N, 4 * ceil(K*bits/32)]   code i of a row is bits i*bits .. (i+1)*bits - 1 of that row, lowest first
//   scale  [N, G] in float32, float16 or bfloat16
//   zero   uint8 [N, G] in code units, or null: 2^(bits-1)
//
// Layout of a 2:4 weight, of which two of every four neighbouring features are kept (compress/formats/sparse24.py):
//   values  [N, K/2] in float32, float16 or bfloat16, in the order of their features
//   bitmask uint8 [N, ceil(K/8)]    bit k % 8 of byte k / 8: whether feature k is among them
#pragma once

#include <stdint.h>

#include "blocks.h"

namespace remanence {

// Rows of x that are multiplied together. A tile of r rows is laid out by quads, four neighbouring features:
//   int8      [K/4][r][4]
//   bfloat16  [K/4][r][4], a quad's features in the order 0 2 1 3
//   float32   [K][r]
// K is padded as the weight's groups are, with zeros.
constexpr int kDirectRows = 5;
constexpr int kPanelRows = 6;
constexpr int kPeakVectors = 12;
constexpr int64_t kAlways = int64_t(1) << 62;

enum class GridKind { asymmetric, symmetric, narrow };    // as in kernels/reference.py

// A grid for the rows of x: from the row itself, or (scale not null) the one given.
struct Grid {
    int bits;
    GridKind kind;    // of the row's own
    float clip;
    const float* scale;
    const int32_t* zero;
};

// One kind of arithmetic on a block: y[i][n] = sum over k of x[i][k] (code[n][k] - zero) scale, float [rows][64], before
// what hangs on the row of x alone.
template <typename X, typename Sum>
struct Multiply {
    // From the packed words, rows <= kDirectRows; sums [G][runs][rows]: of x over each. Overwrites y. Rows that are not
    // finite, or nearly so, come out as anything.
    void (*direct)(const Block& block, int rows, const X* x, const Sum* sums, float* y);
    // Features of one row into a tile of `height` rows, in one run; their sum.
    Sum (*place)(const X* from, int64_t count, int64_t height, X* tile);
    // Rows of x up to which `direct` is faster: of 2, 3 or 4 bits, and of 8. What follows may be null if it always is.
    int64_t direct_rows, direct_rows_wide;
    // Groups first .. last - 1 expanded to what panel multiplies, panel_bytes for a feature; best panel_most features.
    void (*expand)(const Block& block, int64_t first, int64_t last, uint8_t* panel);
    // Adds to y what those groups give, rows <= kPanelRows; x and sums begin at group `first`.
    void (*panel)(const Block& block, const uint8_t* panel, int64_t first, int64_t last, int rows, const X* x,
                  const Sum* sums, float* y);
    int64_t panel_bytes, panel_most;
};

// K is a multiple of four. Any bitmask is safe: it says where values go, and never where they are read.
struct Sparse24 {
    const void* values;
    ScaleType type;
    const uint8_t* bitmask;
    int64_t n, k;
};

constexpr int kRows24 = 4;      // rows of x that are multiplied together, by two of a 2:4 weight
constexpr int kBlock24 = 16;    // rows of such a weight that are the work of one thread

// Features of a row of x, with zeros after them to whole vectors of any table.
static inline int64_t padded24(int64_t k) { return (k + 15) / 16 * 16; }

struct Kernels {
    const char* name;
    void (*unpack_row)(const uint8_t* packed, int64_t k, int bits, uint8_t* codes);
    // w[i] = (codes[i] - zero[g]) * scale[g]: only the product is rounded, so every table gives the same bits.
    void (*scale_row)(const uint8_t* codes, const float* scale, const float* zero, int64_t groups,
                      int64_t group_size, float* w);
    void (*load_row)(const void* row, ScaleType type, int64_t k, float* out);
    void (*store_row)(const float* row, ScaleType type, int64_t n, void* out);
    // One row of x on its grid: codes int8 [K], its scale and zero.
    void (*quantize_row)(const float* x, int64_t k, const Grid& grid, int8_t* codes, float* scale, int32_t* zero);
    // y = Hadamard matrix (Sylvester's, n = 2^m) times x, in place, times `factor`.
    void (*hadamard_row)(float* x, int64_t n, float factor);
    // Rows first .. first + count - 1 (1 or 2) by `rows` <= kRows24 of x [rows][padded24(K)]; y [rows][kBlock24].
    void (*multiply24)(const Sparse24& weight, int64_t first, int count, int rows, const float* x, float* y);
    void (*expand24)(const Sparse24& weight, int64_t row, float* w);    // -> w [K]
    // Reads n bytes (a multiple of 1024) once.
    int32_t (*read)(const uint8_t* bytes, int64_t n);
    // kPeakVectors vectors of products, n times over, from registers: the arithmetic alone. Of 1, 4 and 2 in each lane.
    float (*peak_float)(int64_t n);
    int32_t (*peak_int8)(int64_t n);
    float (*peak_bf16)(int64_t n);    // null where there is none
    int lanes;
    Multiply<int8_t, int32_t> int8;
    Multiply<float, float> float32;
    Multiply<uint16_t, float> bfloat16;    // direct is null where there is no arithmetic for it
};

const Kernels& kernels();    // the table in use (dispatch.cpp)

extern const Kernels scalar_kernels;
#ifdef REMANENCE_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_vnni_kernels;
extern const Kernels avx512_bf16_kernels;
#endif
#ifdef REMANENCE_NEON
extern const Kernels neon_kernels;
#endif

// static: each file keeps its own copy, compiled for its own instruction set.
static inline int64_t packed_width(int64_t k, int bits) { return (k * bits + 31) / 32 * 4; }

}  // namespace remanence
