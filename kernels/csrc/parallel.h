// The parallel loop of all kernels. Each item is the work of one thread: no result depends on their number.
#pragma once

#include <stdint.h>

#ifdef REMANENCE_STD_THREADS    // for the thread sanitizer, which does not see into libgomp
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace remanence {

constexpr int64_t kSerialWork = 1 << 15;    // multiply-adds below which starting the threads costs more than it saves

// f(0) .. f(count - 1), `work` multiply-adds in all.
template <typename Function>
void parallel(int64_t count, int threads, int64_t work, const Function& f) {
#ifdef REMANENCE_STD_THREADS
    std::atomic<int64_t> next{0};
    std::vector<std::thread> team;
    const auto loop = [&] {
        for (int64_t i; (i = next++) < count;) f(i);
    };
    for (int t = 1; t < (work > kSerialWork ? threads : 1); ++t) team.emplace_back(loop);
    loop();
    for (std::thread& thread : team) thread.join();
#else
#pragma omp parallel for schedule(static) num_threads(threads) if (work > kSerialWork)
    for (int64_t i = 0; i < count; ++i) f(i);
#endif
}

}  // namespace remanence
