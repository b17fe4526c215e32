/* Rankings of a node's children: the head's own, or with a bias and coupled to the noise. */
#include "candidates.h"

#include <math.h>
#include <string.h>

#include "noise.h"

void mc_ranker_begin(mc_ranker *ranker, const mc_candidates *candidates,
                     const mc_coupling *coupling) {
    ranker->candidates = candidates;
    ranker->coupling = coupling;
    ranker->operations = mc_operations_here();
    for (int depth = 0; depth < MC_MOST_DEPTH; depth++)
        ranker->level[depth].ranked = ranker->level[depth].looked = 0;
}

/* Log of what is left of 1. */
static float log_rest(float log_taken) {
    float rest = 1 - expf(log_taken);
    return rest > 0 ? logf(rest) : -INFINITY;
}

/* Finds what all parents of a depth share. */
static void look(mc_ranker *ranker, int depth) {
    const mc_candidates *candidates = ranker->candidates;
    const mc_coupling *coupling = ranker->coupling;
    mc_level *level = &ranker->level[depth];
    int count = candidates->ranked;
    level->looked = 1;
    if (candidates->bias)
        level->log_rest =
            log_rest(ranker->operations->log_sum(candidates->log_p + depth * count, count));
    if (!coupling) return;
    uint32_t key = mc_row_key(coupling->seed, coupling->position + depth + 1);
    for (int i = 0; i < count; i++) {
        int32_t token = candidates->tokens[depth * count + i];
        level->noise[i] = (float)mc_gumbel(mc_uniform(mc_token_key(token), key));
    }
}

void mc_write_noise(mc_ranker *ranker) {
    const mc_coupling *coupling = ranker->coupling;
    size_t count = (size_t)ranker->candidates->ranked;
    if (!coupling || !coupling->noise) return;
    for (int depth = 0; depth < ranker->candidates->heads; depth++) {
        if (!ranker->level[depth].looked) look(ranker, depth);
        memcpy(coupling->noise + (size_t)depth * count, ranker->level[depth].noise,
               count * sizeof(float));
    }
}

/* Adds the bias by the parent's token; tokens that are no candidates keep their probability. */
static void add_bias(const mc_ranker *ranker, int depth, int32_t token, float *log_p) {
    const mc_candidates *candidates = ranker->candidates;
    const mc_bias *bias = candidates->bias;
    const mc_operations *operations = ranker->operations;
    mc_format format = (mc_format)bias->format;
    size_t number = format == MC_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
    size_t row = (size_t)(bias->rows ? bias->rows[token] : token);
    float first[MC_MOST_RANK], logits[MC_MOST_GUESSES + 1];
    int count = candidates->ranked;
    operations->embed((const char *)bias->first + row * (size_t)bias->rank * number, format,
                      bias->rank, 1, first);
    operations->dots(bias->second, format, candidates->indices + depth * count, count, first,
                     bias->rank, logits);
    for (int i = 0; i < count; i++) logits[i] += log_p[i];
    logits[count] = ranker->level[depth].log_rest;
    float sum = operations->log_sum(logits, count + 1);
    for (int i = 0; i < count; i++) log_p[i] = logits[i] - sum;
}

/* Places of the numbers, the highest first, the lower place first of equals. NaN is the lowest. */
static void sort(float *x, int count, int32_t *order) {
    for (int i = 0; i < count; i++) {
        int place = i;
        if (!(x[i] > -INFINITY)) x[i] = -INFINITY;
        for (; place > 0 && x[order[place - 1]] < x[i]; place--) order[place] = order[place - 1];
        order[place] = i;
    }
}

/* Cuts the least likely of scores off, until they have 1 - top_p together at most; of equals the
 * lower place goes first. The likeliest stays. */
static void cut_top_p(float *scores, int count, double top_p) {
    float rising[MC_MOST_GUESSES];
    int32_t order[MC_MOST_GUESSES];
    double whole = 0, below = 0;
    float top = -INFINITY;
    for (int i = 0; i < count; i++) {
        rising[i] = -scores[i];
        top = fmaxf(top, scores[i]);
    }
    /* Minus infinity is the highest here: it goes first, and takes nothing. */
    sort(rising, count, order);
    for (int i = 0; i < count; i++) whole += expf(scores[i] - top);
    for (int i = 0; i < count - 1; i++) {
        below += expf(scores[order[i]] - top) / whole;
        if (below > 1 - top_p) return;
        scores[order[i]] = -INFINITY;
    }
}

/* Truncates tempered scores as acceptance.truncate does: top-k, then top-p, then min-p. */
static void truncate_scores(const mc_coupling *coupling, float *scores, int count) {
    int32_t order[MC_MOST_GUESSES];
    if (coupling->top_k && coupling->top_k < count) {
        sort(scores, count, order);
        float least = scores[order[coupling->top_k - 1]];
        for (int i = 0; i < count; i++)
            if (scores[i] < least) scores[i] = -INFINITY;
    }
    if (coupling->top_p < 1) cut_top_p(scores, count, coupling->top_p);
    if (!(coupling->min_p > 0)) return;
    float top = -INFINITY;
    for (int i = 0; i < count; i++) top = fmaxf(top, scores[i]);
    for (int i = 0; i < count; i++)
        if (expf(scores[i] - top) < (float)coupling->min_p) scores[i] = -INFINITY;
}

/* Turns log p into that of winning the draw, whose noise is known. */
static void couple(const mc_ranker *ranker, int depth, float *log_p) {
    const mc_coupling *coupling = ranker->coupling;
    const float *noise = ranker->level[depth].noise;
    int count = ranker->candidates->ranked;
    for (int i = 0; i < count; i++) {
        log_p[i] = coupling->of_log_p[depth] * log_p[i] / coupling->temperature;
        if (!(log_p[i] > -INFINITY)) log_p[i] = -INFINITY; /* NaN has no place in an order */
    }
    truncate_scores(coupling, log_p, count);
    for (int i = 0; i < count; i++) log_p[i] += coupling->of_noise[depth] * noise[i];
    float sum = ranker->operations->log_sum(log_p, count);
    for (int i = 0; i < count; i++) log_p[i] -= sum;
}

const mc_ranking *mc_rank_children(mc_ranker *ranker, int depth, int32_t token) {
    const mc_candidates *candidates = ranker->candidates;
    mc_level *level = &ranker->level[depth];
    mc_ranking *ranking = &level->ranking;
    int count = candidates->ranked, biased = candidates->bias != NULL;
    if (level->ranked) return ranking;
    if (!level->looked) look(ranker, depth);
    level->ranked = !biased; /* then all parents have the same ranking */
    if (candidates->log_p)
        memcpy(ranking->log_p, candidates->log_p + depth * count, (size_t)count * sizeof(float));
    if (biased) add_bias(ranker, depth, token, ranking->log_p);
    if (ranker->coupling) couple(ranker, depth, ranking->log_p);
    if (biased || ranker->coupling) {
        sort(ranking->log_p, count, ranking->order);
        return ranking;
    }
    for (int i = 0; i < count; i++) ranking->order[i] = i;
    return ranking;
}
