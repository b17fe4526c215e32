/* Sixteen floats in two registers of AVX2. */
#ifndef MEDUSA_VECTOR_H
#define MEDUSA_VECTOR_H

#include <immintrin.h>
#include <stdint.h>

enum { VECTORS_AT_ONCE = 2, QUERIES_AT_ONCE = 2, TILES_AT_ONCE = 1 };

typedef struct {
    __m256 low, high;
} vector;

static inline vector vector_all(float x) {
    return (vector){_mm256_set1_ps(x), _mm256_set1_ps(x)};
}

static inline vector vector_load(const float *from) {
    return (vector){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}

static inline void vector_store(float *to, vector v) {
    _mm256_storeu_ps(to, v.low);
    _mm256_storeu_ps(to + 8, v.high);
}

static inline __m256 widened(const uint16_t *from) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

static inline vector vector_load_bfloat16(const uint16_t *from) {
    return (vector){widened(from), widened(from + 8)};
}

static inline __m256 low_half(__m256 v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 16));
}

static inline __m256 high_half(__m256 v) {
    __m256i upper = _mm256_set1_epi32((int)0xFFFF0000);
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(v), upper));
}

/* Of two bfloat16 in each lane, the one in the low half, or the one in the high half. */
static inline vector vector_low_bfloat16(vector v) {
    return (vector){low_half(v.low), low_half(v.high)};
}

static inline vector vector_high_bfloat16(vector v) {
    return (vector){high_half(v.low), high_half(v.high)};
}

/* Rounds to the nearest, ties to even; a NaN stays one. In the low half of each lane. */
static inline __m256i narrowed(__m256 v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
}

static inline void vector_store_bfloat16(uint16_t *to, vector v) {
    __m256i packed = _mm256_packus_epi32(narrowed(v.low), narrowed(v.high));
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(packed, 0xD8));
}

static inline vector vector_add(vector a, vector b) {
    return (vector){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

static inline vector vector_subtract(vector a, vector b) {
    return (vector){_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}

static inline vector vector_multiply(vector a, vector b) {
    return (vector){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}

static inline vector vector_divide(vector a, vector b) {
    return (vector){_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}

static inline vector vector_maximum(vector a, vector b) {
    return (vector){_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}

static inline vector vector_minimum(vector a, vector b) {
    return (vector){_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}

static inline vector vector_multiply_add(vector a, vector b, vector c) {
    return (vector){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

static inline vector vector_zero_below(vector x, float bound, vector y) {
    __m256 least = _mm256_set1_ps(bound);
    return (vector){_mm256_and_ps(y.low, _mm256_cmp_ps(x.low, least, _CMP_GE_OQ)),
                    _mm256_and_ps(y.high, _mm256_cmp_ps(x.high, least, _CMP_GE_OQ))};
}

static inline vector vector_round(vector x) {
    return (vector){_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)};
}

static inline __m256 power_of_two(__m256 n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

static inline vector vector_scale(vector y, vector n) {
    return vector_multiply(y, (vector){power_of_two(n.low), power_of_two(n.high)});
}

static inline __m128 quarter_sum(__m128 v) {
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_add_ss(v, _mm_movehdup_ps(v));
}

static inline float vector_sum(vector v) {
    __m128 first = _mm_add_ss(quarter_sum(_mm256_castps256_ps128(v.low)),
                              quarter_sum(_mm256_extractf128_ps(v.low, 1)));
    __m128 second = _mm_add_ss(quarter_sum(_mm256_castps256_ps128(v.high)),
                               quarter_sum(_mm256_extractf128_ps(v.high, 1)));
    return _mm_cvtss_f32(_mm_add_ss(first, second));
}

/* Four rows of eight numbers become the first and the second half of eight of four. */
static inline void transpose_halves(const float *from, int stride, __m256 *columns) {
    __m256 a = _mm256_loadu_ps(from), b = _mm256_loadu_ps(from + stride);
    __m256 c = _mm256_loadu_ps(from + 2 * stride), d = _mm256_loadu_ps(from + 3 * stride);
    __m256 low = _mm256_unpacklo_ps(a, b), next = _mm256_unpacklo_ps(c, d);
    __m256 high = _mm256_unpackhi_ps(a, b), last = _mm256_unpackhi_ps(c, d);
    columns[0] = _mm256_shuffle_ps(low, next, 0x44);
    columns[1] = _mm256_shuffle_ps(low, next, 0xEE);
    columns[2] = _mm256_shuffle_ps(high, last, 0x44);
    columns[3] = _mm256_shuffle_ps(high, last, 0xEE);
}

static inline void transpose_eight(const float *from, int stride, float *to) {
    __m256 upper[4], lower[4];
    transpose_halves(from, stride, upper);
    transpose_halves(from + 4 * stride, stride, lower);
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + 16 * i, _mm256_permute2f128_ps(upper[i], lower[i], 0x20));
        _mm256_storeu_ps(to + 16 * (i + 4), _mm256_permute2f128_ps(upper[i], lower[i], 0x31));
    }
}

static inline void vector_transpose(const float *from, int stride, float *to) {
    for (int row = 0; row < 16; row += 8)
        for (int i = 0; i < 16; i += 8)
            transpose_eight(from + stride * row + i, stride, to + 16 * i + row);
}

static inline float vector_largest(vector v) {
    __m256 both = _mm256_max_ps(v.low, v.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

static inline int vector_any_above(vector v, float bound) {
    __m256 least = _mm256_set1_ps(bound);
    __m256 above = _mm256_or_ps(_mm256_cmp_ps(v.low, least, _CMP_GT_OQ),
                                _mm256_cmp_ps(v.high, least, _CMP_GT_OQ));
    return _mm256_movemask_ps(above) != 0;
}

#endif
