// Memory that is read whole, again and again: in pages of 2 MiB there are few addresses to translate. Asked for before it
// is written first; where the system has none, nothing happens. (A W4A8 product with one row of x: 10 to 20 % faster.)
#pragma once

#include <stdint.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace remanence {

inline void large_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kLarge = uintptr_t(2) << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kLarge - 1) / kLarge * kLarge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) / kLarge * kLarge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);    // a wish: it may fail
#endif
}

}  // namespace remanence
