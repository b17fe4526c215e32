/* Keyed Gumbel noise: the twin of decoding/noise.py. */
#ifndef MEDUSA_NOISE_H
#define MEDUSA_NOISE_H

#include <math.h>
#include <stdint.h>

/* Spreads every bit over the whole word: lowbias32 (C. Wellons, hash-prospector). */
static inline uint32_t mc_mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ x >> 16;
}

static inline int32_t mc_token_key(int32_t token) { return (int32_t)mc_mix((uint32_t)token + 1); }

static inline uint32_t mc_row_key(int64_t seed, int64_t position) {
    uint64_t key = (uint64_t)position * 0x2545F4914F6CDD1Dull + (uint64_t)seed * 0x9E3779B1ull;
    return mc_mix((uint32_t)(key ^ key >> 32));
}

/* 2^31 times the uniform number of a token. */
static inline float mc_uniform(int32_t token_key, uint32_t row_key) {
    return (float)(int32_t)(mc_mix((uint32_t)token_key ^ row_key) & 0x7FFFFFFFu);
}

static inline double mc_gumbel(float uniform) {
    double u = uniform * 0x1p-31;
    if (u < 0x1p-32) u = 0x1p-32;
    if (u > 1 - 0x1p-24) u = 1 - 0x1p-24;
    return -log(-log1p(-u));
}

#endif
