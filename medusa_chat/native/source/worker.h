/* What the threads of a step share, and what each has of its own. */
#ifndef MEDUSA_WORKER_H
#define MEDUSA_WORKER_H

#include "step.h"

/* So few rows are normed and prepared by every thread for itself: that is faster than waiting. */
enum { MC_FEW_ROWS = 4 };

typedef struct mc_worker mc_worker;

struct mc_engine {
    const mc_model *model;
    const mc_heads *heads;
    const mc_operations *operations;
    mc_team *team;
    int capacity;
    int threads;
    mc_worker *workers; /* [threads] */
    /* Of all rows, shared by the threads. */
    float *x;       /* [rows, hidden], the residual stream */
    float *qkv;     /* [rows, (heads + 2 kv_heads) * head_dim] */
    float *mixed;   /* [rows, heads * head_dim] */
    float *gated;   /* [rows, intermediate] */
    float *product; /* [rows, hidden]; of the heads [heads, hidden] */
    float *guess;   /* [heads, the tokens that they rank] */
    int32_t *guessed; /* [heads, ranked], the likeliest of those, likeliest first */
    void *prepared;
    /* Of the step that runs. */
    const mc_cache *cache;
    mc_step *step;
    int is_chain; /* each row stands below the one before it */
    int32_t depth[MC_MOST_ROWS];
    const int32_t *path[MC_MOST_ROWS];
    int32_t *paths; /* [MC_MOST_ROWS * (MC_MOST_ROWS + 1) / 2] */
    double begin;
    double between;
};

struct mc_worker {
    mc_engine *engine;
    int index;
    int apart;      /* this thread does all rows for itself */
    float *x;       /* own or shared */
    void *prepared; /* own or shared */
    float *own_x;   /* [MC_FEW_ROWS or heads, hidden] */
    void *own_prepared;
    float *normed;  /* [the widest row] */
    float *piece;   /* [the most outputs + MC_MOST_ROWS * MC_PIECE] */
    float *scratch; /* of attention */
    float best[MC_MOST_ROWS];
    int32_t best_token[MC_MOST_ROWS];
};

/* Outputs of a unit whose products are used up at once. They are written to `piece` with this
 * stride, so that output o of row r stands at r * MC_PIECE + o: units follow one another there. */
enum { MC_PIECE = 64 };

/* Scores that queries have together at most when several share a unit of attention. */
enum { MC_SHARED_SCORES = 1 << 17 };

void *mc_allocate(size_t bytes); /* 64-byte aligned; NULL without memory */

/* Where a row of the cache starts, in numbers; and its address. */
static inline size_t mc_slot(const mc_engine *engine, int layer, int head, int row) {
    const mc_cache *cache = engine->cache;
    return (size_t)layer * (size_t)cache->layer_stride + (size_t)head * (size_t)cache->head_stride +
           (size_t)row * (size_t)engine->model->head_dim;
}

static inline void *mc_at(const mc_engine *engine, void *base, size_t place) {
    size_t bytes = engine->cache->format == MC_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
    return (char *)base + place * bytes;
}

/* Multiply all rows with a matrix, together with the other threads; then wait for them. */
void mc_multiply(mc_worker *worker, const mc_matrix *matrix, const void *prepared, int rows,
                 float *y, size_t stride);

/* Outputs of a unit when `threads` share `outputs`. */
int mc_piece(int outputs, int threads);

/* The units of a product that a thread takes, `piece` outputs each, known one ahead. */
typedef struct {
    mc_worker *worker;
    int outputs;
    int piece;
    int first; /* output of this unit, or -1 behind the last one */
    int last;
    int following; /* first output of the next unit, or -1 */
} mc_units;

mc_units mc_units_of(mc_worker *worker, int outputs, int piece);
void mc_advance(mc_units *units);

/* Fetch the weights that a thread will take first. */
void mc_fetch_first(const mc_worker *worker, const mc_matrix *matrix, int piece);

void mc_guess(mc_worker *worker);             /* heads.c */
void mc_forward(mc_worker *worker);           /* forward.c */
void mc_attend(mc_worker *worker, int index); /* attend.c */
void mc_logits(mc_worker *worker, const mc_matrix *matrix, const void *prepared, int rows);
/* The LM head of heads that have none of their own. */
const mc_matrix *mc_shared_lm_head(const mc_engine *engine);

/* What the heads of a step offer, once they have run. */
mc_candidates mc_candidates_of(const mc_engine *engine, const mc_step *step);
int32_t mc_token_of(const mc_step *step, int row);

#endif
