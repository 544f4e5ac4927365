// The library's C interface.
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "schedule.h"
#include "term_limits.h"

#define DSMOE_API extern "C" __attribute__((visibility("default")))

namespace {

enum Level : int32_t { kNone, kLevelAvx2, kLevelAvx512, kLevelAvx512Bf16, kLevelAmx };

#if defined(__x86_64__) && defined(__linux__)
// A process asks once for leave to use the tiles' state; without it the first instruction kills it.
bool may_use_tiles() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

Level best() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kNone;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 29 & 1)) return kNone;  // F16C
    const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!has512) return kLevelAvx2;
    if (!__builtin_cpu_supports("avx512bf16")) return kLevelAvx512;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return kLevelAvx512Bf16;
    const bool tiles = d >> 24 & 1, products = d >> 22 & 1;  // AMX-TILE, AMX-BF16
    return tiles && products && may_use_tiles() ? kLevelAmx : kLevelAvx512Bf16;
}
#else
Level best() { return kNone; }
#endif

// Found out once, and with it whether tiles may be used.
Level machine() {
    static const Level found = best();
    return found;
}

}  // namespace

// The best level of this machine: 0 none, 1 avx2, 2 avx512, 3 avx512_bf16, 4 amx.
DSMOE_API int32_t dsmoe_best_level() { return machine(); }

// Lines of a term at most.
DSMOE_API int32_t dsmoe_max_lines() { return kMaxLines; }

// One layer; `shared` may be null. 0 done, 1 an id is no expert's, 2 out of memory, 3 not a level of this machine.
DSMOE_API int32_t dsmoe_run(const Ffn *routed, const Ffn *shared, const Call *call) {
    const Kernels *const levels[] = {&kAvx2, &kAvx512, &kAvx512Bf16, &kAmx};
    if (call->level < 1 || call->level > machine()) return kBadLevel;
    return run(*routed, shared, *call, *levels[call->level - 1]);
}
