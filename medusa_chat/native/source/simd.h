/* Sixteen outputs at a time: the operations that the matmul kernels are written in.
 *
 * floats and ints hold 16 lanes. codes are bytes, four inputs of 16 outputs; pairs are bfloat16
 * weights, two inputs of 16 outputs. The inputs that meet them are the same for all outputs, so
 * they are spread over the lanes.
 *
 * MC_ROWS is the number of rows that the registers hold beside 16 or 32 outputs.
 * MC_WIDE_ROWS is the largest number of rows computed with 32 outputs at a time. */
#ifndef MEDUSA_SIMD_H
#define MEDUSA_SIMD_H

#include <stdint.h>
#include <string.h>

#include "compiler.h"

/* A body for each row (or group) with a constant index. gcc keeps an array of vectors in registers
 * if all indices are constants from the start; it unrolls loops too late for that. */
#define MC_ROW(number, rows, ...) \
    if (number < (rows)) { enum { row = number }; __VA_ARGS__ }
#define MC_GROUP_OF(number, groups, ...) \
    if (number < (groups)) { enum { group = number }; __VA_ARGS__ }
#define MC_EACH_GROUP(groups, ...) \
    MC_GROUP_OF(0, groups, __VA_ARGS__) MC_GROUP_OF(1, groups, __VA_ARGS__)

/* Bits of the activations that meet int8 and nf4 weights: 8 or 16. */
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

#define MC_FOUR_ROWS(rows, ...)                               \
    MC_ROW(0, rows, __VA_ARGS__) MC_ROW(1, rows, __VA_ARGS__) \
    MC_ROW(2, rows, __VA_ARGS__) MC_ROW(3, rows, __VA_ARGS__)
#if MC_ROWS == 8
#define MC_EACH_ROW(rows, ...)                                \
    MC_FOUR_ROWS(rows, __VA_ARGS__)                           \
    MC_ROW(4, rows, __VA_ARGS__) MC_ROW(5, rows, __VA_ARGS__) \
    MC_ROW(6, rows, __VA_ARGS__) MC_ROW(7, rows, __VA_ARGS__)
#else
#define MC_EACH_ROW(rows, ...) MC_FOUR_ROWS(rows, __VA_ARGS__)
#endif

/* Bytes of four codes are read as they lie, or as pairs of 16 bits: inputs 0, 2, 1, 3. */
#ifdef MC_INPUTS_IN_PAIRS
typedef int16_t mc_int8_input;
#else
typedef int8_t mc_int8_input;
#endif

#endif
