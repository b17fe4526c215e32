/* Decisions of a step by the rules of decoding/acceptance.py, where they are certain.
 *
 * torch's rules are the definition. Their logarithms and sums differ from ours in the last places,
 * and among processors. A decision is certain if no such difference can change it: then it is
 * torch's. Where it is not, about once in thousands of tokens, the caller asks torch.
 */
#ifndef MEDUSA_RULES_H
#define MEDUSA_RULES_H

#include <stdint.h>

typedef enum { MC_GREEDY, MC_EXACT, MC_TYPICAL } mc_rule_kind;

typedef struct {
    const float *logits;       /* [rows, vocabulary] */
    const int32_t *tokens;     /* [rows] */
    const int32_t *parents;    /* [rows], each below its row; the root's any */
    const int32_t *token_keys; /* [vocabulary], of the noise */
    const float *counts;       /* [2, vocabulary], in prompt and reply; NULL without penalties */
    float *scores;             /* [vocabulary], for our use */
    int64_t position;          /* of the root */
    int64_t seed;
    double top_p; /* 1 for none; truncation is for MC_EXACT alone */
    double min_p; /* 0 for none */
    double epsilon;
    double delta;
    float temperature;
    float repetition;
    float presence;
    float frequency;
    int32_t top_k; /* 0 for none */
    int32_t kind;
    int32_t rows;
    int32_t vocabulary;
    int32_t row;  /* the deepest accepted row */
    int32_t next; /* the token behind it */
} mc_rule;

/* 1 if the decision is certain; then `row` and `next` are set. -1 for rows out of range. */
int mc_decide(mc_rule *rule);

int32_t mc_rule_size(void); /* of mc_rule, for a caller that declares it anew */

/* The most tokens that top-k may leave; above, no decision is certain. */
enum { MC_MOST_KEPT = 256 };

#endif
