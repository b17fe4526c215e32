/* The search for the likeliest nodes, best first. See choose.h. */
#include "choose.h"

#include <math.h>
#include <string.h>

enum { MOST = MC_MOST_PATHS + MC_MOST_CHAIN };

typedef struct {
    double sum; /* log p of its path, or of the chain behind it: added up as torch does */
    float score; /* in float32; rounding lifts none above its parent's */
    int32_t token;
    int32_t depth;
    uint8_t agrees; /* its path is the beginning of the chain */
    uint8_t taken;
} node;

typedef struct {
    mc_choice *choice;
    mc_ranker ranker;
    int joint; /* path behind which the chain is a branch of its own; 0 while none is */
    int waiting;
    int32_t heap[MOST]; /* rows that may be taken next, the likeliest first */
    int32_t first_child[MC_MOST_PATHS + 1];
    node node[MOST];
} search;

static int goes_before(const search *s, int32_t a, int32_t b) {
    float score = s->node[a].score, other = s->node[b].score;
    return score > other || (score == other && a < b);
}

static void push(search *s, int32_t row) {
    int place = s->waiting++;
    for (; place && goes_before(s, row, s->heap[(place - 1) / 2]); place = (place - 1) / 2)
        s->heap[place] = s->heap[(place - 1) / 2];
    s->heap[place] = row;
}

static int32_t pop(search *s) {
    int32_t top = s->heap[0], row = s->heap[--s->waiting];
    int place = 0;
    for (int child; (child = 2 * place + 1) < s->waiting; place = child) {
        if (child + 1 < s->waiting && goes_before(s, s->heap[child + 1], s->heap[child])) child++;
        if (!goes_before(s, s->heap[child], row)) break;
        s->heap[place] = s->heap[child];
    }
    s->heap[place] = row;
    return top;
}

/* Log p of being right; a score that is no number is the worst. */
static float right(const mc_choice *choice, int row, int depth, float log_p) {
    float right = choice->measured ? choice->measured[row]
                                   : choice->scale[depth] * log_p + choice->shift[depth];
    if (!(right > -INFINITY)) return -INFINITY;
    return right < 0 ? right : 0;
}

/* Offers the next token of the chain, behind a token of the chain or the path it branches off. */
static void offer_chain(search *s, int before) {
    const mc_choice *choice = s->choice;
    const node *parent = &s->node[before], *joint = &s->node[s->joint];
    int depth = parent->depth;
    if (depth >= choice->chain) return;
    node *next = &s->node[choice->paths + depth];
    next->sum = (before < choice->paths ? 0 : parent->sum) + choice->chain_log_p[depth];
    next->score = (float)next->sum + joint->score;
    next->token = choice->chain_tokens[depth];
    next->depth = depth + 1;
    push(s, choice->paths + depth);
}

static void offer_child(search *s, int row, int parent_row, float log_p, int32_t token) {
    const node *parent = &s->node[parent_row];
    node *child = &s->node[row];
    child->sum = parent->sum + log_p;
    child->score = (float)child->sum;
    child->token = token;
    child->depth = parent->depth + 1;
    push(s, row);
}

static void offer_children(search *s, int row) {
    const mc_choice *choice = s->choice;
    const node *parent = &s->node[row];
    int depth = parent->depth, first = s->first_child[row], last = s->first_child[row + 1];
    int copied = parent->agrees && depth < choice->chain;
    if (first < last) {
        const mc_candidates *candidates = s->ranker.candidates;
        const int32_t *tokens = candidates->tokens + depth * candidates->ranked;
        const mc_ranking *ranking = mc_rank_children(&s->ranker, depth, parent->token);
        for (int child = first; child < last; child++) {
            int32_t candidate = ranking->order[choice->ranks[child]];
            float log_p = right(choice, child, depth, ranking->log_p[candidate]);
            int agrees = copied && tokens[candidate] == choice->chain_tokens[depth];
            if (agrees) log_p = fmaxf(log_p, choice->chain_log_p[depth]);
            s->node[child].agrees = (uint8_t)agrees;
            offer_child(s, child, row, log_p, tokens[candidate]);
            copied = copied && !agrees;
        }
    }
    if (!copied) return;
    s->joint = row;
    offer_chain(s, row);
}

/* Children of a path lie together, in the order of their parents. */
static void find_children(search *s) {
    const mc_choice *choice = s->choice;
    int row = 1;
    for (int parent = 0; parent < choice->paths; parent++) {
        s->first_child[parent] = row;
        while (row < choice->paths && choice->parents[row] == parent) row++;
    }
    s->first_child[choice->paths] = row;
}

/* Lays out what was taken: rows ascending, so that parents precede their children. */
static void finish(search *s) {
    mc_choice *choice = s->choice;
    int32_t place[MOST];
    int count = 0, paths = choice->paths;
    choice->joint = 0;
    for (int row = 0; row < paths + choice->chain; row++) {
        const node *taken = &s->node[row];
        if (!taken->taken) continue;
        int first = row >= paths && row - paths == s->node[s->joint].depth;
        int parent = row < paths ? choice->parents[row] : first ? s->joint : row - 1;
        place[row] = count;
        choice->rows[count] = row;
        choice->tokens[count] = taken->token;
        choice->row_parents[count] = row ? place[parent] : 0;
        if (row >= paths) choice->joint = s->joint;
        count++;
    }
}

int mc_choose(mc_choice *choice, const mc_candidates *candidates, int32_t root) {
    if (!mc_choice_in_range(choice, candidates, root)) return -1;
    if (!mc_candidates_in_range(candidates)) return -1;
    search s;
    s.choice = choice;
    s.joint = s.waiting = 0;
    mc_ranker_begin(&s.ranker, candidates, choice->coupling);
    for (int row = 0; row < choice->paths + choice->chain; row++) s.node[row].taken = 0;
    find_children(&s);
    s.node[0] = (node){.token = root, .agrees = 1};
    push(&s, 0);
    for (int taken = 0; taken < choice->nodes; taken++) {
        int32_t row = pop(&s);
        s.node[row].taken = 1;
        if (row < choice->paths) offer_children(&s, row);
        else offer_chain(&s, row);
    }
    finish(&s);
    mc_write_noise(&s.ranker);
    return 0;
}
