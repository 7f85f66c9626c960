// From the stored layout to blocks and back. A quad, four neighbouring codes a byte each, is the unit of both.
#include "blocks.h"

#include <string.h>

#include <vector>

#include "halves.h"
#include "isa.h"
#include "parallel.h"

namespace remanence {
namespace {

size_t scale_size(ScaleType type) { return type == ScaleType::float32 ? 4 : 2; }

uint32_t load_quad(const uint8_t* codes) {
    uint32_t quad;
    memcpy(&quad, codes, sizeof quad);
    return quad;
}

// One row's words of one step, `kBlockRows` words apart, from its codes.
void write_words(const uint8_t* codes, int bits, uint32_t* words) {
    if (bits == 8) {
        words[0] = load_quad(codes);
    } else if (bits == 4) {
        words[0] = load_quad(codes) | load_quad(codes + 4) << 4;
    } else {
        uint32_t low[2] = {0, 0}, high = 0;
        for (int q = 0; q < (bits == 3 ? 8 : 4); ++q) {
            const uint32_t quad = load_quad(codes + 4 * q);
            low[q / 4] |= (quad & 0x03030303) << 2 * (q % 4);
            high |= (quad >> 2 & 0x01010101) << q;
        }
        words[0] = low[0];
        if (bits == 3) words[kBlockRows] = low[1], words[2 * kBlockRows] = high;
    }
}

void read_words(const uint32_t* words, int bits, uint8_t* codes) {
    const int quads = bits == 3 ? 8 : 8 / bits;
    for (int q = 0; q < quads; ++q, codes += 4) {
        uint32_t quad = words[0];
        if (bits == 4) quad = quad >> 4 * q & 0x0f0f0f0f;
        if (bits == 2) quad = quad >> 2 * q & 0x03030303;
        if (bits == 3)
            quad = (words[q / 4 * kBlockRows] >> 2 * (q % 4) & 0x03030303) | (words[2 * kBlockRows] >> q & 0x01010101) << 2;
        memcpy(codes, &quad, sizeof quad);
    }
}

struct Scratch {
    std::vector<uint8_t> codes, group;
    std::vector<float> scale, zero;
};
thread_local Scratch scratch;

int64_t rows_in(const Geometry& geometry, int64_t index) {
    const int64_t left = geometry.n - index * kBlockRows;
    return left < kBlockRows ? left : kBlockRows;
}

}  // namespace

Block block_at(const Geometry& geometry, const uint8_t* blocks, ScaleType type, bool zero, int64_t index) {
    const uint8_t* const words = blocks + index * geometry.block_bytes(type, zero);
    const uint8_t* const scale = words + geometry.word_bytes();
    return {words,
            scale,
            type,
            zero ? scale + geometry.scale_bytes(type) : nullptr,
            geometry.groups,
            geometry.steps(),
            geometry.runs(),
            geometry.run_steps(),
            geometry.bits};
}

Block lay_out(const Weight& weight, int64_t index, uint8_t* words, uint8_t* scale, uint8_t* zero) {
    const Geometry geometry = geometry_of(weight);
    const int64_t groups = weight.groups, size = geometry.group_size(), rows = rows_in(geometry, index);
    const size_t one = scale_size(weight.scale_type);
    const Kernels& kernel = kernels();
    const int64_t line = geometry.step_lines() * kBlockRows;
    scratch.codes.resize(weight.k);
    scratch.group.assign(geometry.padded_group(), 0);
    if (rows < kBlockRows) {
        memset(words, 0, geometry.word_bytes());
        memset(scale, 0, geometry.scale_bytes(weight.scale_type));
        if (weight.zero) memset(zero, 0, geometry.zero_bytes());
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = index * kBlockRows + r;
        kernel.unpack_row(weight.packed + row * packed_width(weight.k, weight.bits), weight.k, weight.bits,
                          scratch.codes.data());
        uint32_t* out = reinterpret_cast<uint32_t*>(words) + r;
        for (int64_t g = 0; g < groups; ++g) {
            memcpy(scratch.group.data(), scratch.codes.data() + g * size, size);
            for (int64_t s = 0; s < geometry.steps(); ++s, out += line)
                write_words(scratch.group.data() + s * geometry.step_codes(), weight.bits, out);
            memcpy(scale + (g * kBlockRows + r) * one,
                   static_cast<const uint8_t*>(weight.scale) + (row * groups + g) * one, one);
            if (weight.zero) zero[g * kBlockRows + r] = weight.zero[row * groups + g];
        }
    }
    return {words,
            scale,
            weight.scale_type,
            weight.zero ? zero : nullptr,
            groups,
            geometry.steps(),
            geometry.runs(),
            geometry.run_steps(),
            weight.bits};
}

void prepack(const Weight& weight, uint8_t* blocks, int threads) {
    const Geometry geometry = geometry_of(weight);
    parallel(geometry.blocks(), threads, weight.n * weight.k, [&](int64_t index) {
        const Block to = block_at(geometry, blocks, weight.scale_type, weight.zero, index);
        lay_out(weight, index, const_cast<uint8_t*>(to.words),
                static_cast<uint8_t*>(const_cast<void*>(to.scale)), const_cast<uint8_t*>(to.zero));
    });
}

namespace {

void read_codes(const Geometry& geometry, const Block& block, int64_t r, uint8_t* codes) {
    const int64_t size = geometry.group_size();
    const uint32_t* from = reinterpret_cast<const uint32_t*>(block.words) + r;
    scratch.group.resize(geometry.padded_group());
    for (int64_t g = 0; g < geometry.groups; ++g) {
        for (int64_t s = 0; s < geometry.steps(); ++s, from += geometry.step_lines() * kBlockRows)
            read_words(from, geometry.bits, scratch.group.data() + s * geometry.step_codes());
        memcpy(codes + g * size, scratch.group.data(), size);
    }
}

}  // namespace

void unprepack(const uint8_t* blocks, const Weight& weight, uint8_t* packed, void* scale, uint8_t* zero, int threads) {
    const Geometry geometry = geometry_of(weight);
    const int64_t groups = weight.groups, width = packed_width(weight.k, weight.bits);
    const size_t one = scale_size(weight.scale_type);
    parallel(geometry.blocks(), threads, weight.n * weight.k, [&](int64_t index) {
        const Block block = block_at(geometry, blocks, weight.scale_type, zero, index);
        scratch.codes.resize(weight.k);
        for (int64_t r = 0; r < rows_in(geometry, index); ++r) {
            const int64_t row = index * kBlockRows + r;
            read_codes(geometry, block, r, scratch.codes.data());
            pack(scratch.codes.data(), packed + row * width, 1, weight.k, weight.bits, 1);
            for (int64_t g = 0; g < groups; ++g) {
                memcpy(static_cast<uint8_t*>(scale) + (row * groups + g) * one,
                       static_cast<const uint8_t*>(block.scale) + (g * kBlockRows + r) * one, one);
                if (zero) zero[row * groups + g] = block.zero[g * kBlockRows + r];
            }
        }
    });
}

void dequantize_blocks(const uint8_t* blocks, const Weight& weight, float* w, int threads) {
    const Geometry geometry = geometry_of(weight);
    const int64_t groups = weight.groups;
    const Kernels& kernel = kernels();
    parallel(geometry.blocks(), threads, weight.n * weight.k, [&](int64_t index) {
        const Block block = block_at(geometry, blocks, weight.scale_type, weight.zero, index);
        scratch.codes.resize(weight.k);
        scratch.scale.resize(groups);
        scratch.zero.resize(groups);
        for (int64_t r = 0; r < rows_in(geometry, index); ++r) {
            read_codes(geometry, block, r, scratch.codes.data());
            for (int64_t g = 0; g < groups; ++g) {
                scratch.scale[g] = load_scale_at(block.scale, block.scale_type, g * kBlockRows + r);
                scratch.zero[g] = block.zero ? block.zero[g * kBlockRows + r] : 1 << (weight.bits - 1);
            }
            kernel.scale_row(scratch.codes.data(), scratch.scale.data(), scratch.zero.data(), groups,
                             geometry.group_size(), w + (index * kBlockRows + r) * weight.k);
        }
    });
}

}  // namespace remanence
