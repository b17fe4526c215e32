/* Sixteen outputs at a time: the operations that the matmul kernels are written in.
 *
 * floats and ints hold 16 lanes. codes are unsigned bytes, four inputs of 16 outputs; pairs are
 * bfloat16 weights, two inputs of 16 outputs. The inputs that meet them are the same for all
 * outputs, so they are spread over the lanes.
 *
 * MC_ROWS is the number of rows that the registers hold beside 16 or 32 outputs.
 * MC_WIDE_ROWS is the largest number of rows computed with 32 outputs at a time. */
#ifndef MEDUSA_SIMD_H
#define MEDUSA_SIMD_H

#include <stdint.h>
#include <string.h>

#define MC_INLINE static inline __attribute__((always_inline))
#define MC_UNROLL _Pragma("GCC unroll 8")

/* Bits of the activations that meet int8 weights: 8 or 16. */
#ifndef MC_ACTIVATION_BITS
#define MC_ACTIVATION_BITS 8
#endif

#if defined(MC_AVX512)
#include "simd_avx512.h"
#elif defined(MC_AVX2)
#include "simd_avx2.h"
#elif defined(MC_ARM)
#include "simd_arm.h"
#else
#include "simd_portable.h"
#endif

/* Bytes of four codes are read as they lie, or as pairs of 16 bits: inputs 0, 2, 1, 3. */
#ifdef MC_INPUTS_IN_PAIRS
typedef int16_t mc_int8_input;
#else
typedef int8_t mc_int8_input;
#endif

#endif
