/* AVX-512 with VNNI and BF16. */
#include <immintrin.h>

#define MC_ROWS 8
#define MC_WIDE_ROWS 8
#define MC_CODE_OFFSET 128

typedef __m512 floats;
typedef __m512i ints;
typedef __m512i pairs;
typedef __m512i inputs2;
typedef uint16_t mc_bfloat16_input;

MC_INLINE floats floats_splat(float value) { return _mm512_set1_ps(value); }
MC_INLINE floats floats_load(const void *from) { return _mm512_loadu_ps(from); }
MC_INLINE void floats_store(float *to, floats value) { _mm512_storeu_ps(to, value); }
MC_INLINE floats floats_add(floats a, floats b) { return _mm512_add_ps(a, b); }
MC_INLINE floats floats_multiply(floats a, floats b) { return _mm512_mul_ps(a, b); }

MC_INLINE floats floats_fma(floats a, floats b, floats sum) { return _mm512_fmadd_ps(a, b, sum); }

MC_INLINE ints ints_splat(int32_t value) { return _mm512_set1_epi32(value); }
MC_INLINE ints ints_load(const int32_t *from) { return _mm512_loadu_si512(from); }
MC_INLINE ints ints_add(ints a, ints b) { return _mm512_add_epi32(a, b); }
MC_INLINE floats floats_of_ints(ints value) { return _mm512_cvtepi32_ps(value); }

#if MC_ACTIVATION_BITS == 16
#define MC_INPUTS_IN_PAIRS
typedef struct { __m512i even, odd; } codes;
typedef struct { __m512i even, odd; } inputs4;

MC_INLINE codes codes_of(__m512i bytes) {
    codes result = {_mm512_and_si512(bytes, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(bytes, 8)};
    return result;
}

MC_INLINE inputs4 inputs4_load(const void *from) {
    int32_t words[2];
    memcpy(words, from, sizeof words);
    inputs4 result = {_mm512_set1_epi32(words[0]), _mm512_set1_epi32(words[1])};
    return result;
}

MC_INLINE ints ints_dot(ints sum, codes weights, inputs4 x) {
    sum = _mm512_dpwssd_epi32(sum, weights.even, x.even);
    return _mm512_dpwssd_epi32(sum, weights.odd, x.odd);
}
#else
typedef __m512i codes;
typedef __m512i inputs4;

MC_INLINE codes codes_of(__m512i bytes) { return bytes; }

MC_INLINE inputs4 inputs4_load(const void *from) {
    int32_t word;
    memcpy(&word, from, sizeof word);
    return _mm512_set1_epi32(word);
}

MC_INLINE ints ints_dot(ints sum, codes weights, inputs4 x) {
    return _mm512_dpbusd_epi32(sum, weights, x);
}
#endif

MC_INLINE pairs pairs_load(const void *from) { return _mm512_loadu_si512(from); }

MC_INLINE inputs2 inputs2_load(const mc_bfloat16_input *from) {
    int32_t word;
    memcpy(&word, from, sizeof word);
    return _mm512_set1_epi32(word);
}

MC_INLINE floats floats_dot(floats sum, pairs weights, inputs2 x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
}

MC_INLINE codes codes_load(const uint8_t *from) { return codes_of(_mm512_loadu_si512(from)); }

typedef __m512i nf4_table;

MC_INLINE nf4_table nf4_table_of(const uint8_t *values) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)values));
}

MC_INLINE codes nf4_load(nf4_table table, const uint8_t *chunk, int high) {
    __m512i indices = _mm512_srli_epi16(_mm512_loadu_si512(chunk), high ? 4 : 0);
    return codes_of(_mm512_shuffle_epi8(table, _mm512_and_si512(indices, _mm512_set1_epi8(15))));
}
