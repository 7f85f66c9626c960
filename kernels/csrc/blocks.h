// The run-time layout of a weight on a CPU: blocks of 64 output rows, so that a vector holds one input feature (or four)
// of neighbouring rows and no sum ever runs across lanes.
//
// A step is the smallest run of input features that fills whole 32-bit words: 16, 32, 8, 4 codes at 2, 3, 4, 8 bits.
// Every group is padded with code 0 to whole steps, every matrix with rows of code, scale and zero 0 to whole blocks.
// A block is, one after the other,
//   words  [G][steps][lines][64 rows][4 bytes]; byte b of a row's word holds, from its lowest bit,
//          8 bits: code b;   4 bits: codes b, 4 + b;   2 bits: codes b, 4 + b, 8 + b, 12 + b;
//          3 bits: lines 0 and 1 the lower two bits of codes 0 .. 15 and 16 .. 31 as at 2 bits,
//                  line 2 in bit j the third bit of code 4j + b
//   scale  [G][64] as stored
//   zero   uint8 [G][64], absent where it is 2^(bits-1)
// One line is 256 bytes: the words of a block are one linear stream through memory. Weights of whole blocks with the same
// input and form lie behind each other as one weight would.
#pragma once

#include <stdint.h>

#include "rows.h"

namespace remanence {

constexpr int kBlockRows = 64;
constexpr int kLineBytes = 4 * kBlockRows;
constexpr int64_t kRunCodes = 32768;    // 2 * 255 * 128 * 32768 < 2^31

struct Geometry {
    int64_t n, k, groups;
    int bits;
    int64_t run_codes = kRunCodes;

    int64_t blocks() const { return (n + kBlockRows - 1) / kBlockRows; }
    int step_codes() const { return bits == 3 ? 32 : 32 / bits; }
    int step_lines() const { return bits == 3 ? 3 : 1; }
    int64_t group_size() const { return k / groups; }
    int64_t steps() const { return (group_size() + step_codes() - 1) / step_codes(); }    // of one group
    int64_t padded_group() const { return steps() * step_codes(); }
    // A group longer than run_codes is summed in runs of that many: no sum of bytes leaves 32 bits, and none of bfloat16
    // numbers becomes so large that what matters is rounded away.
    int64_t runs() const { return (padded_group() + run_codes - 1) / run_codes; }
    int64_t run_steps() const { return run_codes / step_codes(); }
    int64_t padded_k() const { return groups * padded_group(); }
    int64_t word_bytes() const { return groups * steps() * step_lines() * kLineBytes; }    // of a block, and so on
    int64_t scale_bytes(ScaleType type) const { return groups * kBlockRows * (type == ScaleType::float32 ? 4 : 2); }
    int64_t zero_bytes() const { return groups * kBlockRows; }
    int64_t block_bytes(ScaleType type, bool zero) const {
        return word_bytes() + scale_bytes(type) + (zero ? zero_bytes() : 0);
    }
};

inline Geometry geometry_of(const Weight& weight) { return {weight.n, weight.k, weight.groups, weight.bits}; }

// One block, wherever it lies.
struct Block {
    const uint8_t* words;
    const void* scale;
    ScaleType scale_type;
    const uint8_t* zero;    // null: 2^(bits-1)
    int64_t groups, steps;
    int64_t runs, run_steps;    // of a group, and of all runs but a group's last
    int bits;
};

// Block number `index` of a whole weight in this layout.
Block block_at(const Geometry& geometry, const uint8_t* blocks, ScaleType type, bool zero, int64_t index);
// Block number `index` of a stored weight, laid out in `words`, `scale` and `zero` (each of one block).
Block lay_out(const Weight& weight, int64_t index, uint8_t* words, uint8_t* scale, uint8_t* zero);

void prepack(const Weight& weight, uint8_t* blocks, int threads);
// Exactly undoes prepack; `weight` names the addresses that are written.
void unprepack(const uint8_t* blocks, const Weight& weight, uint8_t* packed, void* scale, uint8_t* zero, int threads);
void dequantize_blocks(const uint8_t* blocks, const Weight& weight, float* w, int threads);

}  // namespace remanence
