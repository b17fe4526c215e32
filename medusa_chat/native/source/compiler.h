/* What is asked of the compiler. */
#ifndef MEDUSA_COMPILER_H
#define MEDUSA_COMPILER_H

#define MC_INLINE static inline __attribute__((always_inline))
#define MC_UNROLL _Pragma("GCC unroll 8")
#define MC_UNROLL_STEPS _Pragma("GCC unroll 4")
#define MC_NOT_UNROLLED _Pragma("GCC unroll 1")

#endif
