/* Sixteen floats in plain C: what the other vector files are held to. */
#ifndef MEDUSA_VECTOR_H
#define MEDUSA_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

enum { VECTORS_AT_ONCE = 2, QUERIES_AT_ONCE = 2, TILES_AT_ONCE = 1 };

typedef struct {
    float lane[16];
} vector;

#define EACH_LANE for (int i = 0; i < 16; i++)

static inline vector vector_all(float x) {
    vector v;
    EACH_LANE v.lane[i] = x;
    return v;
}

static inline vector vector_load(const float *from) {
    vector v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline void vector_store(float *to, vector v) { memcpy(to, &v, sizeof v); }

static inline vector vector_load_bfloat16(const uint16_t *from) {
    vector v;
    EACH_LANE v.lane[i] = mc_from_bfloat16(from[i]);
    return v;
}

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Of two bfloat16 in each lane, the one in the low half, or the one in the high half. */
static inline vector vector_low_bfloat16(vector v) {
    EACH_LANE v.lane[i] = mc_from_bfloat16((uint16_t)bits_of(v.lane[i]));
    return v;
}

static inline vector vector_high_bfloat16(vector v) {
    EACH_LANE v.lane[i] = mc_from_bfloat16((uint16_t)(bits_of(v.lane[i]) >> 16));
    return v;
}

static inline void vector_store_bfloat16(uint16_t *to, vector v) {
    EACH_LANE to[i] = mc_to_bfloat16(v.lane[i]);
}

static inline vector vector_add(vector a, vector b) {
    EACH_LANE a.lane[i] += b.lane[i];
    return a;
}

static inline vector vector_subtract(vector a, vector b) {
    EACH_LANE a.lane[i] -= b.lane[i];
    return a;
}

static inline vector vector_multiply(vector a, vector b) {
    EACH_LANE a.lane[i] *= b.lane[i];
    return a;
}

static inline vector vector_divide(vector a, vector b) {
    EACH_LANE a.lane[i] /= b.lane[i];
    return a;
}

/* a * b + c, rounded once where the processor can. */
static inline vector vector_multiply_add(vector a, vector b, vector c) {
    EACH_LANE {
        float product = a.lane[i] * b.lane[i];
        c.lane[i] += product;
    }
    return c;
}

static inline vector vector_maximum(vector a, vector b) {
    EACH_LANE a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}

static inline vector vector_minimum(vector a, vector b) {
    EACH_LANE a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}

/* y where x is at least `bound`, else 0. */
static inline vector vector_zero_below(vector x, float bound, vector y) {
    EACH_LANE y.lane[i] = x.lane[i] >= bound ? y.lane[i] : 0.0f;
    return y;
}

static inline vector vector_round(vector x) {
    EACH_LANE {
        /* Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even. */
        volatile float shifted = x.lane[i] + 12582912.0f;
        x.lane[i] = shifted - 12582912.0f;
    }
    return x;
}

/* y * 2^n for whole n from -126 to 127. */
static inline vector vector_scale(vector y, vector n) {
    EACH_LANE {
        uint32_t bits = (uint32_t)((int32_t)n.lane[i] + 127) << 23;
        float power;
        memcpy(&power, &bits, sizeof bits);
        y.lane[i] *= power;
    }
    return y;
}

static inline float vector_sum(vector v) {
    float quarter[4];
    for (int i = 0; i < 4; i++) {
        const float *lane = v.lane + 4 * i;
        quarter[i] = (lane[0] + lane[2]) + (lane[1] + lane[3]);
    }
    return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

/* to[16 i + row] = from[stride row + i], 16 numbers of 16 rows. */
static inline void vector_transpose(const float *from, int stride, float *to) {
    for (int row = 0; row < 16; row++) EACH_LANE to[16 * i + row] = from[stride * row + i];
}

static inline float vector_largest(vector v) {
    float largest = v.lane[0];
    EACH_LANE largest = v.lane[i] > largest ? v.lane[i] : largest;
    return largest;
}

static inline int vector_any_above(vector v, float bound) {
    int any = 0;
    EACH_LANE any |= v.lane[i] > bound;
    return any;
}

#endif
