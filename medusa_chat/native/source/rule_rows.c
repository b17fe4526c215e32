/* Rules over a vocabulary, of one variant: plain loops, which compilers turn into vectors. */
/* Else gcc keeps comparisons as branches, which could trap. Results do not depend on it. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif
#include "rule_rows.h"

#include <string.h>

#include "dispatch.h"

extern const mc_rule_rows MC_VARIANT(mc_rule_kernels);

enum { BLOCK = 64 };

static void temper(float *x, int size, float temperature) {
    for (int i = 0; i < size; i++) x[i] = x[i] / temperature;
}

static void penalize(const float *restrict logits, const float *restrict prompt,
                     const float *restrict reply, int size, float repetition, float presence,
                     float frequency, float *restrict y) {
    for (int i = 0; i < size; i++) {
        float less = logits[i] * repetition, over = logits[i] / repetition;
        float repeated = logits[i] < 0 ? less : over;
        float score = prompt[i] + reply[i] > 0 ? repeated : logits[i];
        score = score - frequency * reply[i];
        y[i] = score - presence * (reply[i] > 0 ? 1.0f : 0.0f);
    }
}

/* No less than e^x, and 7% more at most: the line between two powers of 2 lies above the curve. */
static inline float above_exponential(float x) {
    x = x > 1.0f ? 1.0f : x;
    x = x > -80.0f ? x : -80.0f;
    int32_t bits = (int32_t)(x * 12102203.0f) + (127 << 23) + 64;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* Noise above d needs a uniform number below 1 - exp(-e^-d), which is below e^-d. */
static inline int may_hit(float score, int32_t token_key, uint32_t row_key, float best) {
    return mc_uniform(token_key, row_key) < above_exponential(score - best) * 0x1.004p31f;
}

static int next_hit(const float *scores, const int32_t *token_keys, uint32_t row_key, int first,
                    int size, float best) {
    while (first + BLOCK <= size) {
        int hits = 0;
        for (int i = first; i < first + BLOCK; i++)
            hits |= may_hit(scores[i], token_keys[i], row_key, best);
        if (hits) break;
        first += BLOCK;
    }
    while (first < size && !may_hit(scores[first], token_keys[first], row_key, best)) first++;
    return first;
}

static inline float bounded(float x) { return x > -87.0f ? x : -87.0f; }

/* e^x for x from -87 to 0 within some units in the last place; the polynomial is Cephes' expf. */
static inline float exponential(float x) {
    int32_t n = (int32_t)(x * 1.44269504f - 0.5f);
    float whole = (float)n, r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    int32_t bits = (n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return y * scale;
}

static void sums(const float *x, int size, float off, float cut, double *sum, double *weighted) {
    float one[BLOCK] = {0}, other[BLOCK] = {0};
    int i = 0;
    for (; i + BLOCK <= size; i += BLOCK)
        for (int lane = 0; lane < BLOCK; lane++) {
            float away = bounded(x[i + lane] - off), counts = x[i + lane] > cut;
            float power = counts * exponential(away); /* a branch would keep gcc from vectors */
            one[lane] += power;
            other[lane] += power * away;
        }
    for (int lane = 0; i < size; i++, lane++) {
        float away = bounded(x[i] - off), power = x[i] > cut ? exponential(away) : 0.0f;
        one[lane] += power;
        other[lane] += power * away;
    }
    *sum = *weighted = 0;
    for (int lane = 0; lane < BLOCK; lane++) {
        *sum += one[lane];
        *weighted += other[lane];
    }
}

const mc_rule_rows MC_VARIANT(mc_rule_kernels) = {
    .temper = temper,
    .penalize = penalize,
    .next_hit = next_hit,
    .sums = sums,
};
