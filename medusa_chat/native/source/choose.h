/* Chooses the nodes of a step: the n likeliest paths of a superset and of a copied chain.
 *
 * A path (2, 0) of the superset means the root's child of rank 2, and its best child. A node ranks
 * its children among the candidates of the head that guesses behind it. A path is as likely as the
 * product of its guesses, so no child is likelier than its parent: a node's children are ranked
 * when it is taken, and no others ever.
 */
#ifndef MEDUSA_CHOOSE_H
#define MEDUSA_CHOOSE_H

#include <stdint.h>

#include "candidates.h"

enum {
    MC_MOST_PATHS = 1024, /* of a superset */
    MC_MOST_CHAIN = 64,   /* copied tokens */
};

typedef struct {
    int32_t paths;          /* of the superset, the root's included: S */
    const int32_t *parents; /* [S], each below its row and never falling; the root's any */
    const int32_t *ranks;   /* [S], each node's among its siblings, rising for each parent */
    int32_t nodes;          /* to choose, n: S at most; with the root alone, 1 + chain */
    const float *scale;     /* [the superset's depth]: log p of being right is */
    const float *shift;     /* min(0, scale * log p + shift) */
    const float *measured;  /* [S], log p of each path's last guess in place of that; or NULL */
    int32_t chain;          /* copied tokens; 0 for none */
    const int32_t *chain_tokens;
    const float *chain_log_p;    /* of each if those before it are right */
    const mc_coupling *coupling; /* NULL for none */

    int32_t *rows;        /* [n], ascending: below S a path, from S on a token of the chain */
    int32_t *tokens;      /* [n] */
    int32_t *row_parents; /* [n], the place in `rows` of each node's parent */
    int32_t joint; /* path from which the chosen tokens of the chain branch off; 0 without any */
} mc_choice;

/* The n rows of the highest scores, the lower row first of equals. A chain follows the superset as
 * far as their tokens agree, and each guess there is as likely as the surer of its two proposers
 * says; the rest of the chain is a branch of its own. 0, or -1 for a choice, candidates or a root
 * that are out of range; then nothing was done. */
int mc_choose(mc_choice *choice, const mc_candidates *candidates, int32_t root);

/* 0 where `mc_choose` would refuse, whatever the candidates' tokens are. */
int mc_choice_in_range(const mc_choice *choice, const mc_candidates *candidates, int32_t root);

#endif
