/* Loaded before everything else (LD_PRELOAD), hides instruction sets from a process, which then runs natively on the kernels
 * that its libraries have for other processors. MASK_CPUID=avx2 hides AVX-512 and VNNI, MASK_CPUID=sse AVX and FMA too.
 *
 * Linux lets a process fault on CPUID (arch_prctl(2), ARCH_SET_CPUID) if the processor can, and child processes inherit it; the
 * handler answers in the processor's place. See scripts/with-kernels.sh. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

typedef int (*sigaction_t)(int, const struct sigaction *, struct sigaction *);

static int hides_avx;

static int let_cpuid(long allowed) { return (int)syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    (void)info;
    if (code[0] != 0x0f || code[1] != 0xa2) { /* no CPUID: a fault of the program's own */
        signal(number, SIG_DFL);
        return;
    }
    uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX], a, b, c, d;
    let_cpuid(1);
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(subleaf));
    let_cpuid(0);
    if (leaf == 1 && hides_avx)
        c &= ~(BIT(12) | BIT(26) | BIT(27) | BIT(28) | BIT(29)); /* FMA, XSAVE, OSXSAVE, AVX, F16C */
    if (leaf == 7 && subleaf == 0) {
        b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* AVX-512 */
        c &= ~(BIT(1) | BIT(6) | BIT(8) | BIT(9) | BIT(10) | BIT(11) | BIT(12) | BIT(14));     /* its extensions, VNNI */
        d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));               /* AVX-512 again, AMX */
        if (hides_avx)
            b &= ~(BIT(3) | BIT(5) | BIT(8)); /* BMI1, AVX2, BMI2 */
    }
    if (leaf == 7 && subleaf == 1) {
        a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23)); /* AVX-VNNI and later ones */
        d = 0;
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

/* Nobody takes the handler away: Python's faulthandler would. */
int sigaction(int number, const struct sigaction *wanted, struct sigaction *before) {
    sigaction_t real = (sigaction_t)dlsym(RTLD_NEXT, "sigaction");
    if (number == SIGSEGV && wanted) {
        if (before)
            memset(before, 0, sizeof *before);
        return 0;
    }
    return real(number, wanted, before);
}

__attribute__((constructor)) static void mask(void) {
    const char *kernels = getenv("MASK_CPUID");
    sigaction_t real = (sigaction_t)dlsym(RTLD_NEXT, "sigaction");
    struct sigaction handler = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (!kernels)
        return;
    hides_avx = strcmp(kernels, "sse") == 0;
    real(SIGSEGV, &handler, NULL);
    if (let_cpuid(0)) {
        perror("mask_cpuid: this processor or kernel cannot fault on CPUID");
        _exit(75);
    }
}
