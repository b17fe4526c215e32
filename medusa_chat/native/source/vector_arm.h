/* Sixteen floats in four registers of NEON (64-bit ARM). */
#ifndef MEDUSA_VECTOR_H
#define MEDUSA_VECTOR_H

#include <arm_neon.h>
#include <stdint.h>

enum { VECTORS_AT_ONCE = 2, QUERIES_AT_ONCE = 2, TILES_AT_ONCE = 1 };

typedef struct {
    float32x4_t part[4];
} vector;

#define EACH_PART for (int i = 0; i < 4; i++)

static inline vector vector_all(float x) {
    vector v;
    EACH_PART v.part[i] = vdupq_n_f32(x);
    return v;
}

static inline vector vector_load(const float *from) {
    vector v;
    EACH_PART v.part[i] = vld1q_f32(from + 4 * i);
    return v;
}

static inline void vector_store(float *to, vector v) {
    EACH_PART vst1q_f32(to + 4 * i, v.part[i]);
}

static inline vector vector_load_bfloat16(const uint16_t *from) {
    vector v;
    EACH_PART v.part[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16));
    return v;
}

/* Of two bfloat16 in each lane, the one in the low half, or the one in the high half. */
static inline vector vector_low_bfloat16(vector v) {
    EACH_PART {
        uint32x4_t bits = vreinterpretq_u32_f32(v.part[i]);
        v.part[i] = vreinterpretq_f32_u32(vshlq_n_u32(bits, 16));
    }
    return v;
}

static inline vector vector_high_bfloat16(vector v) {
    EACH_PART {
        uint32x4_t bits = vreinterpretq_u32_f32(v.part[i]);
        v.part[i] = vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xFFFF0000)));
    }
    return v;
}

/* Rounds to the nearest, ties to even; a NaN stays one. */
static inline uint16x4_t narrowed(float32x4_t v) {
    uint32x4_t bits = vreinterpretq_u32_f32(v);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), up, quiet), 16);
}

static inline void vector_store_bfloat16(uint16_t *to, vector v) {
    EACH_PART vst1_u16(to + 4 * i, narrowed(v.part[i]));
}

static inline vector vector_add(vector a, vector b) {
    EACH_PART a.part[i] = vaddq_f32(a.part[i], b.part[i]);
    return a;
}

static inline vector vector_subtract(vector a, vector b) {
    EACH_PART a.part[i] = vsubq_f32(a.part[i], b.part[i]);
    return a;
}

static inline vector vector_multiply(vector a, vector b) {
    EACH_PART a.part[i] = vmulq_f32(a.part[i], b.part[i]);
    return a;
}

static inline vector vector_divide(vector a, vector b) {
    EACH_PART a.part[i] = vdivq_f32(a.part[i], b.part[i]);
    return a;
}

static inline vector vector_multiply_add(vector a, vector b, vector c) {
    EACH_PART c.part[i] = vfmaq_f32(c.part[i], a.part[i], b.part[i]);
    return c;
}

static inline vector vector_maximum(vector a, vector b) {
    EACH_PART a.part[i] = vmaxq_f32(a.part[i], b.part[i]);
    return a;
}

static inline vector vector_minimum(vector a, vector b) {
    EACH_PART a.part[i] = vminq_f32(a.part[i], b.part[i]);
    return a;
}

static inline vector vector_zero_below(vector x, float bound, vector y) {
    EACH_PART {
        uint32x4_t keep = vcgeq_f32(x.part[i], vdupq_n_f32(bound));
        y.part[i] = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(y.part[i]), keep));
    }
    return y;
}

static inline vector vector_round(vector x) {
    EACH_PART x.part[i] = vrndnq_f32(x.part[i]);
    return x;
}

static inline vector vector_scale(vector y, vector n) {
    EACH_PART {
        int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.part[i]), vdupq_n_s32(127));
        float32x4_t power = vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
        y.part[i] = vmulq_f32(y.part[i], power);
    }
    return y;
}

static inline float quarter_sum(float32x4_t v) {
    float32x2_t pairs = vadd_f32(vget_low_f32(v), vget_high_f32(v));
    return vget_lane_f32(pairs, 0) + vget_lane_f32(pairs, 1);
}

static inline float vector_sum(vector v) {
    float first = quarter_sum(v.part[0]) + quarter_sum(v.part[1]);
    float second = quarter_sum(v.part[2]) + quarter_sum(v.part[3]);
    return first + second;
}

static inline void transpose_four(const float *from, int stride, float *to) {
    float32x4x2_t upper = vtrnq_f32(vld1q_f32(from), vld1q_f32(from + stride));
    float32x4x2_t lower = vtrnq_f32(vld1q_f32(from + 2 * stride), vld1q_f32(from + 3 * stride));
    for (int i = 0; i < 2; i++) {
        float32x4_t a = upper.val[i], b = lower.val[i];
        vst1q_f32(to + 16 * i, vcombine_f32(vget_low_f32(a), vget_low_f32(b)));
        vst1q_f32(to + 16 * (i + 2), vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
    }
}

static inline void vector_transpose(const float *from, int stride, float *to) {
    for (int row = 0; row < 16; row += 4)
        for (int i = 0; i < 16; i += 4)
            transpose_four(from + stride * row + i, stride, to + 16 * i + row);
}

static inline float vector_largest(vector v) {
    float32x4_t first = vmaxq_f32(v.part[0], v.part[1]);
    return vmaxvq_f32(vmaxq_f32(first, vmaxq_f32(v.part[2], v.part[3])));
}

static inline int vector_any_above(vector v, float bound) { return vector_largest(v) > bound; }

#endif
