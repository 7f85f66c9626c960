// Which instruction sets this machine can run, and which one is in use.
#include <atomic>

#include "isa.h"
#include "rows.h"

namespace remanence {
namespace {

bool always() { return true; }

#ifdef REMANENCE_X86
// The builtin also asks whether the operating system saves the wide registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

struct Choice {
    const Kernels* kernels;
    bool (*supported)();
};

const Choice choices[] = {    // narrowest first
    {&scalar_kernels, always},
#ifdef REMANENCE_X86
    {&avx2_kernels, has_avx2},
    {&avx512_kernels, has_avx512},
#endif
};

const Kernels* widest() {
    const Kernels* found = nullptr;
    for (const Choice& choice : choices)
        if (choice.supported()) found = choice.kernels;
    return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    if (!chosen.load()) {
        const Kernels* unset = nullptr;    // another thread may have chosen meanwhile: keep its choice
        chosen.compare_exchange_strong(unset, widest());
    }
    return *chosen.load();
}

std::string isa() { return kernels().name; }

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Choice& choice : choices)
        if (choice.supported()) names.push_back(choice.kernels->name);
    return names;
}

bool use_isa(const std::string& name) {
    for (const Choice& choice : choices)
        if (name == choice.kernels->name && choice.supported()) {
            chosen = choice.kernels;
            return true;
        }
    return false;
}

}  // namespace remanence
