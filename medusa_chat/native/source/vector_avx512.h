/* Sixteen floats in one register of AVX-512. */
#ifndef MEDUSA_VECTOR_H
#define MEDUSA_VECTOR_H

#include <immintrin.h>
#include <stdint.h>

enum { VECTORS_AT_ONCE = 4, QUERIES_AT_ONCE = 4, TILES_AT_ONCE = 2 };

typedef __m512 vector;

static inline vector vector_all(float x) { return _mm512_set1_ps(x); }
static inline vector vector_load(const float *from) { return _mm512_loadu_ps(from); }
static inline void vector_store(float *to, vector v) { _mm512_storeu_ps(to, v); }

static inline vector vector_load_bfloat16(const uint16_t *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Of two bfloat16 in each lane, the one in the low half, or the one in the high half. */
static inline vector vector_low_bfloat16(vector v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16));
}

static inline vector vector_high_bfloat16(vector v) {
    __m512i upper = _mm512_set1_epi32((int)0xFFFF0000);
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), upper));
}

/* Rounds to the nearest, ties to even; a NaN stays one. */
static inline void vector_store_bfloat16(uint16_t *to, vector v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}

static inline vector vector_add(vector a, vector b) { return _mm512_add_ps(a, b); }
static inline vector vector_subtract(vector a, vector b) { return _mm512_sub_ps(a, b); }
static inline vector vector_multiply(vector a, vector b) { return _mm512_mul_ps(a, b); }
static inline vector vector_divide(vector a, vector b) { return _mm512_div_ps(a, b); }
static inline vector vector_maximum(vector a, vector b) { return _mm512_max_ps(a, b); }
static inline vector vector_minimum(vector a, vector b) { return _mm512_min_ps(a, b); }

static inline vector vector_multiply_add(vector a, vector b, vector c) {
    return _mm512_fmadd_ps(a, b, c);
}

static inline vector vector_zero_below(vector x, float bound, vector y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_GE_OQ), y);
}

static inline vector vector_round(vector x) { return _mm512_roundscale_ps(x, 0); }
static inline vector vector_scale(vector y, vector n) { return _mm512_scalef_ps(y, n); }

static inline vector vector_across(vector a, vector b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

/* Four rows become four columns in each quarter. */
static inline void transpose_quarters(const float *from, int stride, vector *columns) {
    vector a = vector_load(from), b = vector_load(from + stride);
    vector c = vector_load(from + 2 * stride), d = vector_load(from + 3 * stride);
    vector low = _mm512_unpacklo_ps(a, b), next = _mm512_unpacklo_ps(c, d);
    vector high = _mm512_unpackhi_ps(a, b), last = _mm512_unpackhi_ps(c, d);
    columns[0] = _mm512_shuffle_ps(low, next, 0x44);
    columns[1] = _mm512_shuffle_ps(low, next, 0xEE);
    columns[2] = _mm512_shuffle_ps(high, last, 0x44);
    columns[3] = _mm512_shuffle_ps(high, last, 0xEE);
}

static inline void vector_transpose(const float *from, int stride, float *to) {
    vector part[4][4];
    for (int i = 0; i < 4; i++) transpose_quarters(from + 4 * i * stride, stride, part[i]);
    for (int i = 0; i < 4; i++) {
        vector a = _mm512_shuffle_f32x4(part[0][i], part[1][i], 0x44);
        vector b = _mm512_shuffle_f32x4(part[0][i], part[1][i], 0xEE);
        vector c = _mm512_shuffle_f32x4(part[2][i], part[3][i], 0x44);
        vector d = _mm512_shuffle_f32x4(part[2][i], part[3][i], 0xEE);
        vector_store(to + 16 * i, _mm512_shuffle_f32x4(a, c, 0x88));
        vector_store(to + 16 * (i + 4), _mm512_shuffle_f32x4(a, c, 0xDD));
        vector_store(to + 16 * (i + 8), _mm512_shuffle_f32x4(b, d, 0x88));
        vector_store(to + 16 * (i + 12), _mm512_shuffle_f32x4(b, d, 0xDD));
    }
}

static inline float vector_sum(vector v) {
    v = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0x4E));
    v = _mm512_add_ps(v, _mm512_shuffle_ps(v, v, 0xB1));
    v = vector_across(v, v);
    v = vector_across(v, v);
    return _mm512_cvtss_f32(v);
}

static inline float vector_largest(vector v) { return _mm512_reduce_max_ps(v); }

static inline int vector_any_above(vector v, float bound) {
    return _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
}

#endif
