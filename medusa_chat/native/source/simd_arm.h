/* NEON with dot products: 16 lanes are four registers. */
#include <arm_neon.h>

#if MC_ACTIVATION_BITS != 8
#error "16-bit activations are not written for ARM"
#endif

#define MC_ROWS 4
#define MC_WIDE_ROWS 1
#define MC_CODE_OFFSET 0 /* sdot takes signed codes */

typedef struct { float32x4_t quarter[4]; } floats;
typedef struct { int32x4_t quarter[4]; } ints;
typedef struct { int8x16_t quarter[4]; } codes;
typedef int8x16_t inputs4;
typedef struct { floats even, odd; } pairs;
typedef struct { float32x4_t even, odd; } inputs2;
typedef float mc_bfloat16_input;

#define MC_QUARTERS MC_UNROLL for (int i = 0; i < 4; i++)

MC_INLINE floats floats_splat(float value) {
    floats result;
    MC_QUARTERS { result.quarter[i] = vdupq_n_f32(value); }
    return result;
}

MC_INLINE floats floats_load(const void *from) {
    floats result;
    MC_QUARTERS { result.quarter[i] = vld1q_f32((const float *)from + i * 4); }
    return result;
}

MC_INLINE void floats_store(float *to, floats value) {
    MC_QUARTERS { vst1q_f32(to + i * 4, value.quarter[i]); }
}

MC_INLINE floats floats_add(floats a, floats b) {
    MC_QUARTERS { a.quarter[i] = vaddq_f32(a.quarter[i], b.quarter[i]); }
    return a;
}

MC_INLINE floats floats_multiply(floats a, floats b) {
    MC_QUARTERS { a.quarter[i] = vmulq_f32(a.quarter[i], b.quarter[i]); }
    return a;
}

MC_INLINE floats floats_fma(floats a, floats b, floats sum) {
    MC_QUARTERS { sum.quarter[i] = vfmaq_f32(sum.quarter[i], a.quarter[i], b.quarter[i]); }
    return sum;
}

MC_INLINE ints ints_splat(int32_t value) {
    ints result;
    MC_QUARTERS { result.quarter[i] = vdupq_n_s32(value); }
    return result;
}

MC_INLINE floats floats_of_ints(ints value) {
    floats result;
    MC_QUARTERS { result.quarter[i] = vcvtq_f32_s32(value.quarter[i]); }
    return result;
}

MC_INLINE codes codes_load(const uint8_t *from) {
    codes result;
    MC_QUARTERS {
        uint8x16_t bytes = veorq_u8(vld1q_u8(from + i * 16), vdupq_n_u8(128));
        result.quarter[i] = vreinterpretq_s8_u8(bytes);
    }
    return result;
}

MC_INLINE inputs4 inputs4_load(const void *from) {
    int32_t word;
    memcpy(&word, from, sizeof word);
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

MC_INLINE ints ints_dot(ints sum, codes weights, inputs4 x) {
    MC_QUARTERS { sum.quarter[i] = vdotq_s32(sum.quarter[i], weights.quarter[i], x); }
    return sum;
}

MC_INLINE void mc_widen(uint32x4_t words, float32x4_t *even, float32x4_t *odd) {
    *even = vreinterpretq_f32_u32(vshlq_n_u32(words, 16));
    *odd = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000)));
}

MC_INLINE pairs pairs_load(const uint8_t *from) {
    pairs result;
    MC_QUARTERS {
        uint32x4_t words = vreinterpretq_u32_u8(vld1q_u8(from + i * 16));
        mc_widen(words, &result.even.quarter[i], &result.odd.quarter[i]);
    }
    return result;
}

MC_INLINE inputs2 inputs2_load(const mc_bfloat16_input *from) {
    inputs2 result = {vdupq_n_f32(from[0]), vdupq_n_f32(from[1])};
    return result;
}

MC_INLINE floats floats_dot(floats sum, pairs weights, inputs2 x) {
    MC_QUARTERS { sum.quarter[i] = vfmaq_f32(sum.quarter[i], weights.even.quarter[i], x.even); }
    MC_QUARTERS { sum.quarter[i] = vfmaq_f32(sum.quarter[i], weights.odd.quarter[i], x.odd); }
    return sum;
}

typedef int8x16_t nf4_table;

MC_INLINE nf4_table nf4_table_of(const uint8_t *values) {
    return vreinterpretq_s8_u8(vld1q_u8(values));
}

MC_INLINE codes nf4_load(nf4_table table, const uint8_t *chunk, int high) {
    codes result;
    MC_QUARTERS {
        uint8x16_t both = vld1q_u8(chunk + i * 16);
        uint8x16_t indices = high ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15));
        result.quarter[i] = vqtbl1q_s8(table, indices);
    }
    return result;
}
