/* The likeliest tokens of each head, and how a node ranks its children among them. */
#ifndef MEDUSA_CANDIDATES_H
#define MEDUSA_CANDIDATES_H

#include <stdint.h>

#include "operations.h"

enum {
    MC_MOST_GUESSES = 64,
    MC_MOST_DEPTH = 32,   /* of a superset */
    MC_MOST_RANK = 1024,  /* of a bias */
};

/* A bias by the parent's token: the logits of a head get second @ first[row of that token]. */
typedef struct {
    int32_t rank;   /* 0 for no bias */
    int32_t format; /* MC_FLOAT32 or MC_BFLOAT16 */
    int32_t parents;
    int32_t tokens; /* that the heads rank */
    const void *first;   /* [parents, rank] */
    const void *second;  /* [tokens, rank] */
    const int32_t *rows; /* [vocabulary], of `first` for each token; NULL: the token itself */
} mc_bias;

/* Guesses coupled to the noise that the targets will be drawn with. */
typedef struct {
    int64_t seed;
    int64_t position; /* of the root */
    double top_p;     /* 1 for none */
    double min_p;     /* 0 for none */
    const float *of_log_p;  /* [depth], weights of log p and of the noise in a score */
    const float *of_noise;
    float *noise;           /* [heads, ranked], of each candidate, written; NULL if not wanted */
    float temperature;
    int32_t top_k; /* 0 for none */
} mc_coupling;

typedef struct {
    int32_t heads;
    int32_t ranked;         /* of each head; 0 without heads */
    int32_t vocabulary;     /* of the backbone */
    const int32_t *tokens;  /* [heads, ranked], likeliest first, no token twice */
    const int32_t *indices; /* [heads, ranked], of the tokens among those that the heads rank */
    const float *log_p;     /* [heads, ranked]; NULL where nothing reads it */
    const mc_bias *bias;    /* NULL for none */
} mc_candidates;

/* The candidates of one head in the order of a node's children. */
typedef struct {
    float log_p[MC_MOST_GUESSES]; /* of each candidate, behind this parent */
    int32_t order[MC_MOST_GUESSES];
} mc_ranking;

/* What rankings of one depth share. */
typedef struct {
    int32_t ranked; /* the ranking below is known, and the same for all parents */
    int32_t looked; /* the rest is known */
    float log_rest; /* log of the probability of all tokens that are no candidates */
    float noise[MC_MOST_GUESSES];
    mc_ranking ranking;
} mc_level;

typedef struct {
    const mc_candidates *candidates;
    const mc_coupling *coupling; /* NULL for none */
    const mc_operations *operations;
    mc_level level[MC_MOST_DEPTH];
} mc_ranker;

/* 0 where a token or an index is out of range. */
int mc_candidates_in_range(const mc_candidates *candidates);

void mc_ranker_begin(mc_ranker *ranker, const mc_candidates *candidates,
                     const mc_coupling *coupling);

/* Write the noise of all candidates, if the coupling wants it. */
void mc_write_noise(mc_ranker *ranker);

/* Rank the children of a node at `depth` with a token. It stands until the next call. */
const mc_ranking *mc_rank_children(mc_ranker *ranker, int depth, int32_t token);

#endif
