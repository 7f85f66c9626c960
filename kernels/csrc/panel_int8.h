// Bytes expanded before they are multiplied: faster where few registers make `direct` go through a line in many passes.
// Included after tiles.h.
namespace remanence {
namespace {

// panel [K/4][64][4] uint8: the codes.
template <int BITS>
void expand_int8_bits(const Block& block, int64_t first, int64_t last, uint8_t* panel) {
    using S = Step<BITS>;
    const uint8_t* words = block.words + first * block.steps * S::lines * kLineBytes;
    for (int64_t s = 0; s < (last - first) * block.steps; ++s, words += S::lines * kLineBytes, panel += S::quads * kLineBytes)
        for (int at = 0; at < kLineBytes; at += 4 * kLanes) {
            I word[S::lines];
            load_words<BITS>(words + at, word);
            prefetch<BITS>(words + at, at);
            UNROLL for (int q = 0; q < S::quads; ++q) Vec::store_words(panel + q * kLineBytes + at, quad<BITS>(word, q));
        }
}

template <bool WIDE, int R, int J>
void panel_int8_lanes(const Block& block, int lane, const uint8_t* panel, int64_t first, int64_t last, const int8_t* x,
                      const int32_t* sums, float* y) {
    const int middle = 1 << (block.bits - 1);
    panel += 4 * lane;
    for (int64_t p = first * block.runs; p < last * block.runs; ++p, sums += R) {
        const int64_t g = p / block.runs, quads = steps_of(block, p % block.runs) * step_quads(block);
        I sum[R][J];
        UNROLL for (int i = 0; i < R; ++i)
            UNROLL for (int j = 0; j < J; ++j) sum[i][j] = Vec::set(block.zero ? 0 : -middle * sums[i]);
        if constexpr (WIDE) {
            for (int64_t q = 0; q < quads; ++q, panel += kLineBytes, x += 4 * R) {
                I codes[J];
                UNROLL for (int j = 0; j < J; ++j) codes[j] = Vec::load(panel + 4 * kLanes * j);
                UNROLL for (int i = 0; i < R; ++i) {
                    const I features = Vec::broadcast(x + 4 * i);
                    UNROLL for (int j = 0; j < J; ++j) sum[i][j] = Vec::dot_wide(sum[i][j], codes[j], features);
                }
            }
        } else {
            for (int64_t q = 0; q < quads; q += 2, panel += 2 * kLineBytes, x += 8 * R) {
                I even[J], odd[J];
                UNROLL for (int j = 0; j < J; ++j) {
                    even[j] = Vec::load(panel + 4 * kLanes * j);
                    odd[j] = Vec::load(panel + kLineBytes + 4 * kLanes * j);
                }
                UNROLL for (int i = 0; i < R; ++i) {
                    const I one = Vec::broadcast(x + 4 * i), two = Vec::broadcast(x + 4 * (R + i));
                    UNROLL for (int j = 0; j < J; ++j) sum[i][j] = Vec::dot_two(sum[i][j], even[j], one, odd[j], two);
                }
            }
        }
        UNROLL for (int j = 0; j < J; ++j) {
            const int64_t at = g * kBlockRows + lane + kLanes * j;
            const F scale = Vec::scale(block.scale, block.scale_type, at);
            if (block.zero) {
                const I zero = Vec::load_bytes(block.zero + at);
                UNROLL for (int i = 0; i < R; ++i) sum[i][j] = Vec::sub(sum[i][j], Vec::multiply(zero, Vec::set(sums[i])));
            }
            UNROLL for (int i = 0; i < R; ++i) {
                float* const out = y + i * kBlockRows + lane + kLanes * j;
                Vec::store(out, Vec::fma(Vec::to_float(sum[i][j]), scale, Vec::load_floats(out)));
            }
        }
    }
}

void expand_int8(const Block& block, int64_t first, int64_t last, uint8_t* panel) {
    BY_BITS(expand_int8_bits, > (block, first, last, panel))
}

template <int R>
void panel_int8_rows(const Block& block, const uint8_t* panel, int64_t first, int64_t last, const int8_t* x,
                     const int32_t* sums, float* y) {
    constexpr int J = kPanelVectors;
    for (int lane = 0; lane < kBlockRows; lane += kLanes * J) {
        if (block.bits == 8)
            panel_int8_lanes<true, R, J>(block, lane, panel, first, last, x, sums, y);
        else
            panel_int8_lanes<false, R, J>(block, lane, panel, first, last, x, sums, y);
    }
}

void panel_int8(const Block& block, const uint8_t* panel, int64_t first, int64_t last, int rows, const int8_t* x,
                const int32_t* sums, float* y) {
    BY_PANEL_ROWS(panel_int8_rows, (block, panel, first, last, x, sums, y))
}

}  // namespace
}  // namespace remanence
