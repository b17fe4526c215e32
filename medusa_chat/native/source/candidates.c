/* Rankings of a node's children: the head's own, or with a bias and coupled to the noise. */
#include "candidates.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

void mc_ranker_begin(mc_ranker *ranker, const mc_candidates *candidates,
                     const mc_coupling *coupling) {
    ranker->candidates = candidates;
    ranker->coupling = coupling;
    ranker->operations = mc_operations_here();
    for (int depth = 0; depth < MC_MOST_DEPTH; depth++)
        ranker->level[depth].ranked = ranker->level[depth].looked = 0;
}

const mc_ranking *mc_rank_children(mc_ranker *ranker, int depth, int32_t token) {
    const mc_candidates *candidates = ranker->candidates;
    mc_level *level = &ranker->level[depth];
    int count = candidates->ranked;
    (void)token;
    if (level->ranked) return &level->ranking;
    for (int i = 0; i < count; i++) level->ranking.order[i] = i;
    level->ranked = 1;
    if (candidates->log_p)
        memcpy(level->ranking.log_p, candidates->log_p + depth * count,
               (size_t)count * sizeof(float));
    return &level->ranking;
}
