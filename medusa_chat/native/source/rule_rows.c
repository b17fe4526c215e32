/* Rules over a vocabulary, of one variant. Compilers turn the plain loops into vectors. */
/* Else gcc keeps comparisons as branches, which could trap. Results do not depend on it. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif
#include "rule_rows.h"

#include <math.h>
#include <string.h>

#include "dispatch.h"
#include "vector.h"
#include "vector_math.h"

extern const mc_rule_rows MC_VARIANT(mc_rule_kernels);

enum { LANES = 16, BLOCK = 64 };

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

static int finite(const float *x, int size) {
    int others = 0;
    for (int i = 0; i < size; i++) others |= x[i] - x[i] != 0.0f;
    return !others;
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

static void sums(const float *x, int size, float off, float cut, double *sum, double *weighted) {
    vector powers = vector_all(0.0f), products = powers, least = vector_all(-87.0f);
    float bound = nextafterf(cut, INFINITY);
    for (int i = 0; i < size; i += LANES) {
        float padded[LANES];
        int count = size - i < LANES ? size - i : LANES;
        for (int lane = 0; lane < LANES; lane++) padded[lane] = -INFINITY;
        memcpy(padded, x + i, (size_t)count * sizeof *x);
        vector here = vector_load(padded);
        vector away = vector_maximum(vector_subtract(here, vector_all(off)), least);
        vector power = vector_zero_below(here, bound, vector_exponential(away));
        powers = vector_add(powers, power);
        products = vector_multiply_add(power, away, products);
    }
    *sum = vector_sum(powers);
    *weighted = vector_sum(products);
}

const mc_rule_rows MC_VARIANT(mc_rule_kernels) = {
    .temper = temper,
    .penalize = penalize,
    .finite = finite,
    .next_hit = next_hit,
    .sums = sums,
};
