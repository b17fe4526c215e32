#include "dispatch.h"
#include "kernels.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

MC_DECLARE_VARIANTS(mc_kernel, mc_float32);
MC_DECLARE_VARIANTS(mc_kernel, mc_bfloat16);
MC_DECLARE_VARIANTS(mc_kernel, mc_int8);
MC_DECLARE_VARIANTS(mc_kernel, mc_nf4);

static const mc_kernel *const float32[] = MC_VARIANTS(mc_float32);
static const mc_kernel *const bfloat16[] = MC_VARIANTS(mc_bfloat16);
static const mc_kernel *const int8[] = MC_VARIANTS(mc_int8);
static const mc_kernel *const nf4[] = MC_VARIANTS(mc_nf4);

static int always(void) { return 1; }

#if defined(__x86_64__)
#include <cpuid.h>

typedef struct { unsigned a, b, c, d; } leaf;

static leaf cpuid_of(unsigned number, unsigned part) {
    leaf result = {0, 0, 0, 0};
    __get_cpuid_count(number, part, &result.a, &result.b, &result.c, &result.d);
    return result;
}

static int has(unsigned word, unsigned bits) { return (word & bits) == bits; }

/* The operating system must save the registers too. */
static int saves(unsigned state) {
    if (!has(cpuid_of(1, 0).c, 1u << 27)) {
        return 0;
    }
    unsigned low;
    unsigned high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return has(low, state);
}

static int has_avx2(void) {
    unsigned fma_and_f16c = 1u << 12 | 1u << 29;
    return saves(0x6) && has(cpuid_of(1, 0).c, fma_and_f16c) && has(cpuid_of(7, 0).b, 1u << 5);
}

static int has_avx2vnni(void) { return has_avx2() && has(cpuid_of(7, 1).a, 1u << 4); }

static int has_avx512(void) {
    unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    return has_avx2() && saves(0xe6) && has(cpuid_of(7, 0).b, f_dq_bw_vl)
        && has(cpuid_of(7, 0).c, 1u << 11) && has(cpuid_of(7, 1).a, 1u << 5);
}

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* A process asks the kernel for tiles once; its threads inherit the permission. */
static int may_use_tiles(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#else
static int may_use_tiles(void) { return 0; }
#endif

static int has_amx(void) {
    unsigned bf16_tile_int8 = 1u << 22 | 1u << 24 | 1u << 25;
    return has_avx512() && saves(0x60000) && has(cpuid_of(7, 0).d, bf16_tile_int8)
        && may_use_tiles();
}

static const char *const names[] = {"portable", "avx2", "avx2vnni", "avx512", "amx"};
static int (*const supported[])(void) = {always, has_avx2, has_avx2vnni, has_avx512, has_amx};

#elif defined(__aarch64__)

#if defined(__linux__)
#include <sys/auxv.h>

static int has_arm(void) { return (getauxval(AT_HWCAP) & 1ul << 20) != 0; }
#else
static int has_arm(void) { return 1; }
#endif

static const char *const names[] = {"portable", "arm"};
static int (*const supported[])(void) = {always, has_arm};

#else

static const char *const names[] = {"portable"};
static int (*const supported[])(void) = {always};

#endif

enum { VARIANTS = sizeof names / sizeof *names };

static pthread_once_t chosen_once = PTHREAD_ONCE_INIT;
static int chosen;
static char usable[64];

static int find(const char *name) {
    for (int index = 0; index < VARIANTS; index++) {
        if (strcmp(name, names[index]) == 0 && supported[index]()) {
            return index;
        }
    }
    return -1;
}

static void choose(void) {
    for (int index = 0; index < VARIANTS; index++) {
        if (supported[index]()) {
            chosen = index;
            strcat(usable, usable[0] ? " " : "");
            strcat(usable, names[index]);
        }
    }
    const char *wanted = getenv("MEDUSA_CHAT_NATIVE");
    if (wanted && find(wanted) >= 0) {
        chosen = find(wanted);
    }
}

int mc_variant_index(void) {
    pthread_once(&chosen_once, choose);
    return chosen;
}

const char *mc_variant(void) { return names[mc_variant_index()]; }

const char *mc_variants(void) {
    mc_variant_index();
    return usable;
}

int mc_use(const char *name) {
    mc_variant_index();
    int index = find(name);
    if (index >= 0) {
        chosen = index;
    }
    return index >= 0 ? 0 : -1;
}

static const mc_kernel *kernel_of(mc_format format) {
    int index = mc_variant_index();
    switch (format) {
    case MC_FLOAT32: return float32[index];
    case MC_BFLOAT16: return bfloat16[index];
    case MC_INT8: return int8[index];
    case MC_NF4: return nf4[index];
    }
    return NULL;
}

/* More than 16 rows may be read in sixteens. */
size_t mc_rows_bytes(mc_format format, int rows, int inputs) {
    int read = rows > 16 ? mc_steps(rows, 16) * 16 : rows;
    return (size_t)read * kernel_of(format)->row_bytes(inputs);
}

/* rows, the size of the whole block, is for forms that interleave rows; none does today. */
void mc_prepare_rows(mc_format format, int inputs, int rows, int first_row, int count,
                     const float *x, size_t x_stride, void *prepared) {
    (void)rows;
    const mc_kernel *kernel = kernel_of(format);
    uint8_t *first = (uint8_t *)prepared + (size_t)first_row * kernel->row_bytes(inputs);
    kernel->prepare(inputs, count, x + (size_t)first_row * x_stride, x_stride, first);
}

void mc_matmul(const mc_matrix *matrix, const void *prepared, int rows, int first, int last,
               int following, float *y, size_t y_stride) {
    const mc_kernel *kernel = kernel_of(matrix->format);
    kernel->matmul(matrix, prepared, rows, first, last, following, y, y_stride);
}

void mc_fetch(const mc_matrix *matrix, int output) {
    size_t group = mc_group_bytes(matrix->format, matrix->inputs);
    const char *tile = (const char *)matrix->packed + (size_t)(output / MC_GROUP) * group;
    for (size_t byte = 0; byte < MC_TILE / MC_GROUP * group; byte += 64) {
        __builtin_prefetch(tile + byte, 0, 2);
    }
}
