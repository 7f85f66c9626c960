#include "probe.h"

#include <string.h>

#include <atomic>
#include <chrono>
#include <memory>

#include "isa.h"
#include "pages.h"
#include "parallel.h"

namespace remanence {
namespace {

constexpr int64_t kPiece = 1 << 20;
constexpr int64_t kTurns = 200000;    // of a peak's loop: about a millisecond

double seconds() {
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

std::atomic<int64_t> sink;    // so that no result is left out

template <typename Function>
double fastest(int repeats, const Function& f) {
    double best = 0;
    for (int i = 0; i < repeats; ++i) {
        const double begin = seconds();
        f();
        const double took = seconds() - begin;
        if (i == 0 || took < best) best = took;
    }
    return best;
}

}  // namespace

double read_bandwidth(int64_t bytes, int threads, int repeats) {
    static std::unique_ptr<uint8_t[]> memory;    // kept: its pages are mapped once
    static int64_t held = 0;
    const int64_t pieces = bytes / kPiece < 1 ? 1 : bytes / kPiece;
    if (held < pieces * kPiece) {
        held = pieces * kPiece;
        memory.reset(new uint8_t[held]);
        large_pages(memory.get(), held);
        memset(memory.get(), 1, held);
    }
    const uint8_t* const from = memory.get();
    const double took = fastest(repeats, [&] {
        parallel(pieces, threads, bytes, [&](int64_t i) { sink += kernels().read(from + i * kPiece, kPiece); });
    });
    return double(pieces * kPiece) / took;
}

double peak(Arithmetic kind, int threads, int repeats) {
    const Kernels& kernel = kernels();
    if (kind == Arithmetic::bfloat16 && !kernel.peak_bf16) return 0;
    const double took = fastest(repeats, [&] {
        parallel(threads, threads, kTurns, [&](int64_t) {
            switch (kind) {
                case Arithmetic::float32: sink += kernel.peak_float(kTurns) > 0; break;
                case Arithmetic::int8: sink += kernel.peak_int8(kTurns); break;
                case Arithmetic::bfloat16: sink += kernel.peak_bf16(kTurns) > 0; break;
            }
        });
    });
    const int products = kind == Arithmetic::float32 ? 1 : kind == Arithmetic::int8 ? 4 : 2;
    return 2.0 * products * kernel.lanes * kPeakVectors * kTurns * threads / took;
}

}  // namespace remanence
