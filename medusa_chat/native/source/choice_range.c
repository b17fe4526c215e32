/* Checks of a choice, so that no number from outside leads out of its arrays. */
#include <math.h>
#include <stddef.h>

#include "choose.h"

static int all_finite(const float *x, int count) {
    for (int i = 0; i < count; i++)
        if (!isfinite(x[i])) return 0;
    return 1;
}

/* Log p of something: no NaN, and not above 0. */
static int all_log_p(const float *x, int count) {
    for (int i = 0; i < count; i++)
        if (!(x[i] <= 0)) return 0;
    return 1;
}

/* Depth of the superset; -1 where it is none. */
static int depth_of(const mc_choice *choice, int ranked) {
    int32_t depth[MC_MOST_PATHS] = {0};
    if (choice->paths < 1 || choice->paths > MC_MOST_PATHS) return -1;
    for (int row = 1; row < choice->paths; row++) {
        int32_t parent = choice->parents[row], rank = choice->ranks[row];
        int32_t before = row > 1 ? choice->parents[row - 1] : 0;
        if (parent < before || parent >= row || rank < 0 || rank >= ranked) return -1;
        if (row > 1 && parent == before && rank <= choice->ranks[row - 1]) return -1;
        depth[row] = depth[parent] + 1;
    }
    return depth[choice->paths - 1];
}

static int coupling_in_range(const mc_coupling *coupling, int heads, int depth) {
    if (!coupling) return 1;
    if (coupling->noise && heads > MC_MOST_DEPTH) return 0;
    if (!isfinite(coupling->temperature) || !(coupling->temperature > 0)) return 0;
    if (isnan(coupling->top_p) || isnan(coupling->min_p) || coupling->top_k < 0) return 0;
    if (!depth) return 1;
    return coupling->of_log_p && all_finite(coupling->of_log_p, depth) && coupling->of_noise &&
           all_finite(coupling->of_noise, depth);
}

static int chain_in_range(const mc_choice *choice, int vocabulary) {
    if (choice->chain < 0 || choice->chain > MC_MOST_CHAIN) return 0;
    for (int k = 0; k < choice->chain; k++)
        if (choice->chain_tokens[k] < 0 || choice->chain_tokens[k] >= vocabulary) return 0;
    return all_finite(choice->chain_log_p, choice->chain) &&
           all_log_p(choice->chain_log_p, choice->chain);
}

static int likelihood_in_range(const mc_choice *choice, const mc_candidates *candidates,
                               int depth) {
    if (!depth) return 1;
    int ranks = candidates->bias || choice->coupling;
    if (!candidates->log_p && (ranks || !choice->measured)) return 0;
    if (choice->measured) return all_log_p(choice->measured + 1, choice->paths - 1);
    return choice->scale && choice->shift && all_finite(choice->scale, depth) &&
           all_finite(choice->shift, depth);
}

int mc_choice_in_range(const mc_choice *choice, const mc_candidates *candidates, int32_t root) {
    int ranked = candidates->ranked;
    if (root < 0 || root >= candidates->vocabulary) return 0;
    if (ranked < 0 || ranked > MC_MOST_GUESSES) return 0;
    int depth = depth_of(choice, ranked);
    if (depth < 0 || depth > candidates->heads || depth > MC_MOST_DEPTH) return 0;
    if (!chain_in_range(choice, candidates->vocabulary)) return 0;
    int most = choice->paths == 1 ? 1 + choice->chain : choice->paths;
    if (choice->nodes < 1 || choice->nodes > most) return 0;
    return likelihood_in_range(choice, candidates, depth) &&
           coupling_in_range(choice->coupling, candidates->heads, depth);
}

int mc_candidates_in_range(const mc_candidates *candidates) {
    const mc_bias *bias = candidates->bias;
    if (!candidates->ranked) return 1;
    for (int i = 0; i < candidates->heads * candidates->ranked; i++) {
        int32_t token = candidates->tokens[i];
        if (token < 0 || token >= candidates->vocabulary) return 0;
        if (!bias) continue;
        if (candidates->indices[i] < 0 || candidates->indices[i] >= bias->tokens) return 0;
        int32_t row = bias->rows ? bias->rows[token] : token;
        if (row < 0 || row >= bias->parents) return 0;
    }
    return !bias || (bias->rank > 0 && bias->rank <= MC_MOST_RANK);
}
