/* Rows rounded to integers, block by block. */
#ifndef MEDUSA_ROUNDING_H
#define MEDUSA_ROUNDING_H

#include "simd.h"

/* A block whose numbers are all smaller than this counts as zeros. */
#define MC_NEGLIGIBLE 1e-30f

/* The largest magnitude; not a number if one of them is not. */
MC_INLINE float magnitude(const float *x, int count) {
    int32_t most = 0;
    for (int input = 0; input < count; input++) {
        union { float real; int32_t bits; } word = {x[input]};
        int32_t bits = word.bits & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    union { int32_t bits; float real; } word = {most};
    return word.real;
}

/* Adding 1.5 * 2^23 rounds to the nearest integer, as rintf does, which is a slow call. */
MC_INLINE int32_t nearest(float value) {
    union { float real; int32_t bits; } word = {value + 12582912.0f};
    return word.bits - 0x4b400000;
}

#endif
