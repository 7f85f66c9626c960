// Scratch memory of the products.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace remanence {

// Grows, and keeps its memory between calls. Addresses are multiples of a cache line.
class Memory {
public:
    template <typename T>
    T* get(int64_t count) {
        const size_t need = count * sizeof(T) + 64;
        if (bytes_.size() < need) bytes_.resize(need);
        return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes_.data()) + 63) / 64 * 64);
    }

private:
    std::vector<uint8_t> bytes_;
};

}  // namespace remanence
