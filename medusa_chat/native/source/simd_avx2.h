/* AVX2 and FMA, with or without VNNI: 16 lanes are two registers. */
#include <immintrin.h>

#define MC_ROWS 4
#define MC_WIDE_ROWS 1
#define MC_CODE_OFFSET 128

typedef struct { __m256 low, high; } floats;
typedef struct { __m256i low, high; } ints;
typedef float mc_bfloat16_input;

MC_INLINE floats floats_splat(float value) {
    floats result = {_mm256_set1_ps(value), _mm256_set1_ps(value)};
    return result;
}

MC_INLINE floats floats_load(const void *from) {
    const float *lanes = from;
    floats result = {_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8)};
    return result;
}

MC_INLINE void floats_store(float *to, floats value) {
    _mm256_storeu_ps(to, value.low);
    _mm256_storeu_ps(to + 8, value.high);
}

MC_INLINE floats floats_add(floats a, floats b) {
    floats result = {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
    return result;
}

MC_INLINE floats floats_multiply(floats a, floats b) {
    floats result = {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
    return result;
}

MC_INLINE floats floats_fma(floats a, floats b, floats sum) {
    floats result = {_mm256_fmadd_ps(a.low, b.low, sum.low),
                     _mm256_fmadd_ps(a.high, b.high, sum.high)};
    return result;
}

MC_INLINE ints ints_splat(int32_t value) {
    ints result = {_mm256_set1_epi32(value), _mm256_set1_epi32(value)};
    return result;
}

MC_INLINE floats floats_of_ints(ints value) {
    floats result = {_mm256_cvtepi32_ps(value.low), _mm256_cvtepi32_ps(value.high)};
    return result;
}

MC_INLINE __m256i mc_load256(const void *from) { return _mm256_loadu_si256(from); }

#ifdef __AVXVNNI__
#define MC_MADD(sum, a, b) _mm256_dpwssd_avx_epi32(sum, a, b)
#else
#define MC_MADD(sum, a, b) _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
#endif

#if defined(__AVXVNNI__) && MC_ACTIVATION_BITS == 8
typedef struct { __m256i low, high; } codes;
typedef __m256i inputs4;

MC_INLINE codes codes_of(__m256i low, __m256i high) {
    codes result = {low, high};
    return result;
}

MC_INLINE inputs4 inputs4_load(const void *from) {
    int32_t word;
    memcpy(&word, from, sizeof word);
    return _mm256_set1_epi32(word);
}

MC_INLINE ints ints_dot(ints sum, codes weights, inputs4 x) {
    sum.low = _mm256_dpbusd_avx_epi32(sum.low, weights.low, x);
    sum.high = _mm256_dpbusd_avx_epi32(sum.high, weights.high, x);
    return sum;
}
#else
/* vpmaddubsw would saturate: bytes are widened to 16 bits, inputs 0 and 2 apart from 1 and 3. */
#define MC_INPUTS_IN_PAIRS
typedef struct { __m256i low_even, low_odd, high_even, high_odd; } codes;
typedef struct { __m256i even, odd; } inputs4;

MC_INLINE codes codes_of(__m256i low, __m256i high) {
    __m256i bytes = _mm256_set1_epi16(0xff);
    codes result = {_mm256_and_si256(low, bytes), _mm256_srli_epi16(low, 8),
                    _mm256_and_si256(high, bytes), _mm256_srli_epi16(high, 8)};
    return result;
}

MC_INLINE inputs4 inputs4_load(const void *from) {
    int32_t words[2];
    memcpy(words, from, sizeof words);
    inputs4 result = {_mm256_set1_epi32(words[0]), _mm256_set1_epi32(words[1])};
    return result;
}

MC_INLINE ints ints_dot(ints sum, codes weights, inputs4 x) {
    sum.low = MC_MADD(MC_MADD(sum.low, weights.low_even, x.even), weights.low_odd, x.odd);
    sum.high = MC_MADD(MC_MADD(sum.high, weights.high_even, x.even), weights.high_odd, x.odd);
    return sum;
}
#endif

MC_INLINE codes codes_load(const uint8_t *from) {
    return codes_of(mc_load256(from), mc_load256(from + 32));
}

typedef struct { floats even, odd; } pairs;
typedef struct { __m256 even, odd; } inputs2;

MC_INLINE __m256 mc_even(__m256i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

MC_INLINE __m256 mc_odd(__m256i words) {
    return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32((int)0xffff0000)));
}

MC_INLINE pairs mc_pairs_of(__m256i low, __m256i high) {
    pairs result = {{mc_even(low), mc_even(high)}, {mc_odd(low), mc_odd(high)}};
    return result;
}

MC_INLINE pairs pairs_load(const uint8_t *from) {
    return mc_pairs_of(mc_load256(from), mc_load256(from + 32));
}

MC_INLINE inputs2 inputs2_load(const mc_bfloat16_input *from) {
    inputs2 result = {_mm256_set1_ps(from[0]), _mm256_set1_ps(from[1])};
    return result;
}

MC_INLINE floats floats_dot(floats sum, pairs weights, inputs2 x) {
    sum.low = _mm256_fmadd_ps(weights.even.low, x.even, sum.low);
    sum.high = _mm256_fmadd_ps(weights.even.high, x.even, sum.high);
    sum.low = _mm256_fmadd_ps(weights.odd.low, x.odd, sum.low);
    sum.high = _mm256_fmadd_ps(weights.odd.high, x.odd, sum.high);
    return sum;
}

typedef __m256i nf4_table;

MC_INLINE nf4_table nf4_table_of(const uint8_t *values) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)values));
}

MC_INLINE __m256i mc_look_up(nf4_table table, const uint8_t *from, int high) {
    __m256i indices = _mm256_srli_epi16(mc_load256(from), high ? 4 : 0);
    return _mm256_shuffle_epi8(table, _mm256_and_si256(indices, _mm256_set1_epi8(15)));
}

MC_INLINE codes nf4_load(nf4_table table, const uint8_t *chunk, int high) {
    return codes_of(mc_look_up(table, chunk, high), mc_look_up(table, chunk + 32, high));
}
