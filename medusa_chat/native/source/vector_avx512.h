/* Sixteen floats in one register of AVX-512. */
#ifndef MEDUSA_VECTOR_H
#define MEDUSA_VECTOR_H

#include <immintrin.h>
#include <stdint.h>

enum { VECTORS_AT_ONCE = 4 }; /* of each of two queries that the registers hold */

typedef __m512 vector;

static inline vector vector_all(float x) { return _mm512_set1_ps(x); }
static inline vector vector_load(const float *from) { return _mm512_loadu_ps(from); }
static inline void vector_store(float *to, vector v) { _mm512_storeu_ps(to, v); }

static inline vector vector_load_bfloat16(const uint16_t *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
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

/* Adds lanes 0 and 2, 1 and 3 of each quarter, of two vectors at once. */
static inline vector vector_halves(vector a, vector b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

static inline vector vector_quarters(vector a, vector b) {
    __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    vector low = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    return _mm512_add_ps(low, _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
}

static inline vector vector_across(vector a, vector b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

/* The sums of four vectors, quarter by quarter. */
static inline vector vector_four(const vector *v) {
    return vector_quarters(vector_halves(v[0], v[1]), vector_halves(v[2], v[3]));
}

static inline vector vector_sums(const vector *v) {
    vector first = vector_across(vector_four(v), vector_four(v + 4));
    vector second = vector_across(vector_four(v + 8), vector_four(v + 12));
    return vector_across(first, second);
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
