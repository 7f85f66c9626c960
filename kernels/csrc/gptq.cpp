// The parallel loops, and the portable kernels. Rows and groups are independent: no result depends on the thread count.
#include "gptq.h"

#include <string>
#include <vector>

#define LANES 4
#include "gptq_rows.h"
#include "parallel.h"
#include "rows.h"

namespace remanence {

const GptqKernels gptq_scalar = {LANES, gptq_rows, clip_row};

namespace {

struct alignas(4 * kMostLanes) Column {
    float rows[kMostLanes];
};
thread_local std::vector<Column> scratch;    // grows to the widest block seen

const GptqKernels& gptq_kernels() {
#ifdef REMANENCE_X86
    const std::string name = isa();
    if (name.rfind("avx512", 0) == 0) return gptq_avx512;
    if (name == "avx2") return gptq_avx2;
#endif
    return gptq_scalar;
}

}  // namespace

void gptq_block(const GptqBlock& block, int threads) {
    const GptqKernels& kernel = gptq_kernels();
    const int64_t lanes = kernel.lanes, parts = (block.n + lanes - 1) / lanes;
    parallel(parts, threads, block.n * block.b * block.b, [&](int64_t part) {
        if (int64_t(scratch.size()) < block.b) scratch.resize(block.b);
        const int64_t first = part * lanes, left = block.n - first;
        kernel.gptq_rows(block, first, int(left < lanes ? left : lanes), scratch.data()->rows);
    });
}

void clip_error(const ClipError& clip, int threads) {
    const GptqKernels& kernel = gptq_kernels();
    parallel(clip.m, threads, clip.m * clip.g * clip.s, [&](int64_t m) { kernel.clip_row(clip, m); });
}

}  // namespace remanence
