/* What a step does between its matrices, for one family of processors.
 *
 * Each works on one row, or on rows of one text that do not change each other's results: a number
 * comes out the same, bit for bit, wherever it stands and whatever is computed beside it.
 */
#ifndef MEDUSA_OPERATIONS_H
#define MEDUSA_OPERATIONS_H

#include <stddef.h>
#include <stdint.h>

#include "matmul.h"

typedef enum { MC_SILU, MC_GELU } mc_activation;

enum { MC_QUERIES = 64 }; /* that `attend` takes at once at most */

/* Attention of one key and value head over the text and a tree of rows behind it.
 *
 * Row r stands at position start + depth[r]. It sees the positions before `start` in slots of the
 * same number, then its path: position start + d in slot start + path[r][d]. */
typedef struct {
    const float *queries; /* [rows, query_stride], of which this head's group is group * head_dim */
    float *mixed;         /* [rows, mixed_stride], likewise */
    size_t query_stride;
    size_t mixed_stride;
    const void *keys;   /* [slots, head_dim] */
    const void *values; /* [slots, head_dim] */
    mc_format format;   /* of keys and values: MC_FLOAT32 or MC_BFLOAT16 */
    int head_dim;
    int group;  /* query heads that share this head */
    int start;
    int window; /* positions that a row sees, itself included; 0 for all */
    float scale;
    float cap; /* 0 for none */
    const int32_t *depth;
    const int32_t *const *path; /* NULL where row r stands at depth r behind all rows before it */
} mc_attention;

typedef struct {
    void (*embed)(const void *row, mc_format format, int size, float scale, float *x);
    void (*store)(const float *x, int size, mc_format format, void *to);
    void (*add)(float *x, const float *y, int size);
    void (*norm)(const float *x, const float *weight, int size, float epsilon, float *y);
    /* Turns x[i] and x[half + i] by one angle. */
    void (*rotate)(float *x, const float *cosine, const float *sine, int half);
    /* gate = activation(gate) * up */
    void (*gate)(mc_activation activation, float *gate, const float *up, int size);
    /* x += silu(y) */
    void (*add_silu)(float *x, const float *y, int size);
    /* x = cap * tanh(x / cap) */
    void (*cap)(float *x, float cap, int size);
    float (*largest)(const float *x, int size);
    /* The first place of `size` whose number is above `bound`, or `size`. */
    int (*first_above)(const float *x, int size, float bound);
    float (*log_sum)(const float *x, int size); /* log of the sum of e^x */
    /* Products of x with some rows of a matrix [., size]: y[i] = x . matrix[rows[i]]. */
    void (*dots)(const void *matrix, mc_format format, const int32_t *rows, int count,
                 const float *x, int size, float *y);
    /* Floats that `attend` needs for so many queries over so many positions. */
    size_t (*attend_scratch)(int queries, int positions, int head_dim);
    /* Queries first to last - 1 of the rows' queries, each row's group in order. */
    void (*attend)(const mc_attention *attention, int first, int last, float *scratch);
} mc_operations;

/* Those for this processor, chosen as the kernels of matmul.h are. */
const mc_operations *mc_operations_here(void);

#endif
