/* Chooses, at load, the variant of the kernels that suits the processor.
 *
 * A file that names MC_VARIANT is compiled once for each variant of the platform (see build.py),
 * with MC_PORTABLE, MC_AVX2, MC_AVX512 or MC_ARM defined. It exports one constant:
 *     const mc_kernel MC_VARIANT(mc_int8) = {...};
 * and the file that chooses declares all of them and picks by mc_variant_index():
 *     MC_DECLARE_VARIANTS(mc_kernel, mc_int8);
 *     static const mc_kernel *const int8[] = MC_VARIANTS(mc_int8);
 */
#ifndef MEDUSA_DISPATCH_H
#define MEDUSA_DISPATCH_H

#define MC_JOIN_AGAIN(name, variant) name##_##variant
#define MC_JOIN(name, variant) MC_JOIN_AGAIN(name, variant)
#define MC_VARIANT(name) MC_JOIN(name, MC_VARIANT_NAME)

#if defined(__x86_64__)
#define MC_DECLARE_VARIANTS(type, name) \
    extern const type name##_portable, name##_avx2, name##_avx2vnni, name##_avx512, name##_amx
#define MC_VARIANTS(name) \
    {&name##_portable, &name##_avx2, &name##_avx2vnni, &name##_avx512, &name##_amx}
#elif defined(__aarch64__)
#define MC_DECLARE_VARIANTS(type, name) extern const type name##_portable, name##_arm
#define MC_VARIANTS(name) {&name##_portable, &name##_arm}
#else
#define MC_DECLARE_VARIANTS(type, name) extern const type name##_portable
#define MC_VARIANTS(name) {&name##_portable}
#endif

/* The variant in use: the best that the processor has, or the one that the environment variable
 * MEDUSA_CHAT_NATIVE names if the processor has it. */
int mc_variant_index(void);
const char *mc_variant(void);

/* Names of the variants that this processor can run, separated by spaces; the best is last. */
const char *mc_variants(void);

/* Use another variant from now on. 0, or -1 where the processor or the platform lacks it. Not
 * while kernels run; prepared rows are not shared among variants. */
int mc_use(const char *name);

#endif
