/* A step of a plain decoder in one call: the Medusa heads' guesses, n rows of the backbone behind
 * the cached text, and greedy acceptance. Each part can be left out.
 *
 * Rows are computed in float32 between the matrices. A row's result depends on its own path alone.
 */
#ifndef MEDUSA_STEP_H
#define MEDUSA_STEP_H

#include <stddef.h>
#include <stdint.h>

#include "choose.h"
#include "matmul.h"
#include "operations.h"
#include "team.h"

/* Pointers are borrowed, and must live as long as the engine. A norm that a family does not have is
 * NULL; weights of norms are float32, with Gemma's 1 added already. */
typedef struct {
    const float *attention_norm; /* [hidden], before attention */
    const float *attention_post; /* [hidden], on attention's result */
    const float *mlp_norm;
    const float *mlp_post;
    const float *query_norm; /* [head_dim] */
    const float *key_norm;
    mc_matrix qkv; /* queries, keys, values of all heads, one below the other */
    mc_matrix output;
    mc_matrix gate;
    mc_matrix up;
    mc_matrix down;
    int32_t window; /* positions that a row sees, itself included; 0 for all */
    int32_t rope;   /* which of the two tables */
} mc_layer;

typedef struct {
    int32_t hidden;
    int32_t layers;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t rotary; /* numbers of a head that are turned, even */
    int32_t intermediate;
    int32_t vocabulary;
    int32_t positions; /* of the tables; a row that stands further along takes the last one's */
    int32_t activation; /* mc_activation */
    float epsilon;
    float attention_scale;
    float attention_cap; /* 0 for none */
    float final_cap;
    float embedding_scale;
    int32_t embedding_format;
    const void *embedding; /* [vocabulary, hidden] */
    const float *final_norm;
    mc_matrix lm_head;
    const mc_layer *layer;
    const float *cosine[2]; /* [positions, rotary / 2] */
    const float *sine[2];
} mc_model;

/* Medusa heads: residual blocks x + silu(W x + b), then LM heads. The bias by the parent's token is
 * for steps that choose their rows. */
typedef struct {
    int32_t heads;
    int32_t layers;
    const mc_matrix *block;   /* [layers * heads], layer by layer */
    const mc_matrix *lm_head; /* [heads], or NULL: they share one */
    const mc_matrix *shared;  /* that one, or NULL: the backbone's */
    int32_t vocabulary;       /* tokens that they rank, N: outputs of their LM heads */
    const int32_t *tokens;    /* [N], those of the backbone; NULL: all of them in order */
    mc_bias bias;
} mc_heads;

/* Keys and values, [layers, kv_heads, capacity, head_dim] each; strides in numbers. */
typedef struct {
    void *keys;
    void *values;
    int64_t layer_stride;
    int64_t head_stride;
    int32_t capacity;
    int32_t format; /* MC_FLOAT32 or MC_BFLOAT16 */
} mc_cache;

typedef struct {
    int32_t rows;  /* of the backbone; 0: only the heads run */
    int32_t start; /* positions of the text: row r is written to slot start + r */
    /* Either the rows' tokens, or where to find them in [root, guesses head by head]. */
    const int32_t *tokens;
    const int32_t *table;
    int32_t root;
    int32_t ranked;         /* guesses of each head; 0: the heads do not run */
    const int32_t *parents; /* [rows], each below its row, the root's any; NULL for a chain */
    /* NULL, or what chooses the rows behind `root`: then `rows`, `tokens` and `parents` are taken
     * from its results. */
    mc_choice *choice;
    /* [rows] both, or NULL: each row is of a text of its own choice, which lies in the slots from
     * `texts` on, and stands at position `places` there. `start` and `parents` do not count then.
     * Rows of one text may be in any order. */
    const int32_t *texts;
    const int32_t *places;
    float *last;            /* [hidden]: what the heads read, and acceptance replaces */

    int32_t *guesses;     /* [heads, ranked], likeliest first, the lower id first of equals */
    float *log_p;         /* [heads, ranked], or NULL */
    int32_t *row_tokens;  /* [rows], or NULL */
    float *hidden;        /* [rows, hidden], behind the final norm */
    float *logits;        /* [rows - first_logits, vocabulary], or NULL */
    int32_t *argmax;      /* [rows - first_logits], or NULL */
    int32_t first_logits; /* the first row that meets the LM head; `rows` for none */
    int32_t accept;       /* accept greedily: needs argmax of all rows, and `last` */

    int32_t accepted; /* row of the deepest accepted node, the first of equals */
    int32_t next;     /* the token behind it */
    double heads_seconds;
    double rows_seconds;
} mc_step;

typedef struct mc_engine mc_engine;

enum { MC_MOST_ROWS = 256, MC_MOST_HEAD_DIM = 256 };

/* NULL without memory, or for sizes out of range. `heads` may be NULL. */
mc_engine *mc_engine_new(const mc_model *model, const mc_heads *heads, mc_team *team,
                         int capacity);
void mc_engine_free(mc_engine *engine);

/* 0, or -1 for rows, tokens or parents that are out of range; then nothing was done. */
int mc_engine_step(mc_engine *engine, const mc_cache *cache, mc_step *step);

/* Move rows [count] behind `start`, ascending, to the slots from `start` on. */
void mc_cache_keep(const mc_cache *cache, int layers, int kv_heads, int head_dim, int start,
                   const int32_t *rows, int count);

/* Sizes of the structures above, for a caller that declares them anew: mc_matrix, mc_layer,
 * mc_model, mc_heads, mc_cache, mc_step, mc_choice, mc_coupling, mc_bias, mc_candidates. */
void mc_structure_sizes(int32_t sizes[10]);

#endif
