// Which instruction sets this machine can run, and which one is in use.
#ifdef REMANENCE_NEON
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <atomic>

#include "isa.h"
#include "rows.h"

namespace remanence {
namespace {

bool always() { return true; }

#ifdef REMANENCE_X86
// The builtin also asks whether the operating system saves the wide registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

#ifdef REMANENCE_NEON
bool has_neon() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }    // products of four bytes
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
    {&avx512_vnni_kernels, has_avx512_vnni},
    {&avx512_bf16_kernels, has_avx512_bf16},
#endif
#ifdef REMANENCE_NEON
    {&neon_kernels, has_neon},
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
