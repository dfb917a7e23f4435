/* Dispatch levels that this processor can run. On x86 by the compiler's run time, which also checks that the system saves
 * the wide registers, but AMX's, for which a process asks; on Arm by the kernel's hwcap. */
#include "kernels.h"

extern const struct kernels kernels_portable;
#ifdef NEURON_X86
#include <sys/syscall.h>
#include <unistd.h>

extern const struct kernels kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_amx_bf16;
#endif
#ifdef NEURON_ARM64
#include <asm/hwcap.h>
#include <sys/auxv.h>

extern const struct kernels kernels_neon_dotprod;
#endif

enum { MAX_LEVELS = 5 };

#ifdef NEURON_X86
/* Whether the system lets this process, and all its threads, use the tiles: ARCH_REQ_XCOMP_PERM of XTILEDATA. It refuses
 * where it does not know them, or where a thread's signal stack is too small for them. */
static int may_use_tiles(void) {
    static _Atomic int answer; /* 0: not asked yet; several threads may ask */
    if (answer == 0) answer = syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? 1 : -1;
    return answer > 0;
}
#endif

static int list(const struct kernels *found[MAX_LEVELS]) {
    int count = 0;
#ifdef NEURON_X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vnni");
    int bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    int amx = bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
    if (amx && may_use_tiles()) found[count++] = &kernels_amx_bf16;
    if (bf16) found[count++] = &kernels_avx512_bf16;
    if (avx512) found[count++] = &kernels_avx512;
    if (avx2) found[count++] = &kernels_avx2;
#endif
#ifdef NEURON_ARM64
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found[count++] = &kernels_neon_dotprod;
#endif
    found[count++] = &kernels_portable;
    return count;
}

const struct kernels *kernels_at(int index) {
    const struct kernels *found[MAX_LEVELS];
    int count = list(found);
    return index >= 0 && index < count ? found[index] : NULL;
}

const struct kernels *best_kernels(void) { return kernels_at(0); }

const struct kernels *find_kernels(const char *name) {
    const struct kernels *found;
    for (int i = 0; (found = kernels_at(i)) != NULL; i++)
        if (strcmp(found->name, name) == 0) return found;
    return NULL;
}
