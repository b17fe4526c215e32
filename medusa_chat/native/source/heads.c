/* Medusa heads: blocks on the last hidden state, LM heads, and the likeliest tokens of each. */
#include <math.h>
#include <string.h>

#include "worker.h"

/* Where head k's row stands in memory for single rows of the heads' format. */
static void *single(const mc_worker *worker, const mc_matrix *matrix, int k) {
    size_t bytes = mc_rows_bytes(matrix->format, 1, matrix->inputs);
    return (char *)worker->own_prepared + (size_t)k * ((bytes + 63) / 64 * 64);
}

/* One matrix a head, each for its own row, in units of all threads. */
static void multiply_each(mc_worker *worker, const mc_matrix *matrix, int one_row, float *y) {
    mc_engine *engine = worker->engine;
    int outputs = matrix->outputs, heads = engine->heads->heads;
    int piece = mc_piece(outputs, engine->threads), pieces = (outputs + piece - 1) / piece;
    for (int unit; (unit = mc_team_next(engine->team, worker->index, heads * pieces)) >= 0;) {
        int k = unit / pieces, first = unit % pieces * piece;
        int last = first + piece < outputs ? first + piece : outputs;
        float *to = y + (size_t)k * (size_t)outputs;
        mc_matmul(&matrix[k], single(worker, matrix, one_row ? 0 : k), 1, first, last, -1, to,
                  (size_t)outputs);
    }
    mc_team_barrier(engine->team, worker->index);
}

static void run_blocks(mc_worker *worker) {
    mc_engine *engine = worker->engine;
    const mc_heads *heads = engine->heads;
    int hidden = engine->model->hidden;
    size_t stride = (size_t)hidden;
    for (int k = 0; k < heads->heads; k++)
        memcpy(worker->own_x + (size_t)k * stride, engine->step->last, stride * sizeof(float));
    for (int layer = 0; layer < heads->layers; layer++) {
        const mc_matrix *block = heads->block + layer * heads->heads;
        for (int k = 0; k < (layer ? heads->heads : 1); k++)
            mc_prepare_rows(block->format, hidden, 1, 0, 1, worker->own_x + (size_t)k * stride,
                            stride, single(worker, block, k));
        /* Products of one layer are read while those of the next are written. */
        float *product = layer % 2 ? engine->qkv : engine->product;
        multiply_each(worker, block, layer == 0, product);
        for (int k = 0; k < heads->heads; k++)
            engine->operations->add_silu(worker->own_x + (size_t)k * stride,
                                         product + (size_t)k * stride, hidden);
    }
}

static void run_lm_heads(mc_worker *worker) {
    mc_engine *engine = worker->engine;
    const mc_heads *heads = engine->heads;
    int hidden = engine->model->hidden;
    const mc_matrix *own = heads->lm_head, *shared = mc_shared_lm_head(engine);
    if (!own) {
        mc_prepare_rows(shared->format, hidden, heads->heads, 0, heads->heads, worker->own_x,
                        (size_t)hidden, worker->own_prepared);
        mc_multiply(worker, shared, worker->own_prepared, heads->heads, engine->guess,
                    (size_t)shared->outputs);
        return;
    }
    for (int k = 0; k < heads->heads; k++)
        mc_prepare_rows(own->format, hidden, 1, 0, 1, worker->own_x + (size_t)k * (size_t)hidden,
                        (size_t)hidden, single(worker, own, k));
    multiply_each(worker, own, 0, engine->guess);
}

/* Puts a token among the likeliest so far, behind those that are as likely. */
static void insert(float *value, int32_t *token, int count, float x, int32_t id) {
    int place = count - 1;
    for (; place > 0 && value[place - 1] < x; place--) {
        value[place] = value[place - 1];
        token[place] = token[place - 1];
    }
    value[place] = x;
    token[place] = id;
}

static void likeliest(const mc_operations *operations, const float *logits, int vocabulary,
                      int count, float *value, int32_t *token) {
    int first = 0;
    for (int i = 0; i < count; i++) value[i] = -INFINITY;
    for (int i = 0; i < count; i++) token[i] = i;
    while (first < vocabulary) {
        first += operations->first_above(logits + first, vocabulary - first, value[count - 1]);
        if (first == vocabulary) return;
        insert(value, token, count, logits[first], first);
        first++;
    }
}

static void rank(mc_worker *worker, int k) {
    mc_engine *engine = worker->engine;
    const mc_heads *heads = engine->heads;
    mc_step *step = engine->step;
    int ranked = step->ranked, vocabulary = heads->vocabulary;
    float value[MC_MOST_GUESSES];
    int32_t *index = engine->guessed + k * ranked, *guesses = step->guesses + k * ranked;
    float *logits = engine->guess + (size_t)k * (size_t)vocabulary;
    likeliest(engine->operations, logits, vocabulary, ranked, value, index);
    for (int i = 0; i < ranked; i++)
        guesses[i] = heads->tokens ? heads->tokens[index[i]] : index[i];
    if (!step->log_p) return;
    float sum = engine->operations->log_sum(logits, vocabulary);
    for (int i = 0; i < ranked; i++) step->log_p[k * ranked + i] = value[i] - sum;
}

const mc_matrix *mc_shared_lm_head(const mc_engine *engine) {
    const mc_heads *heads = engine->heads;
    return heads && heads->shared ? heads->shared : &engine->model->lm_head;
}

mc_candidates mc_candidates_of(const mc_engine *engine, const mc_step *step) {
    mc_candidates candidates = {.vocabulary = engine->model->vocabulary};
    if (!engine->heads || !step->ranked) return candidates;
    candidates.heads = engine->heads->heads;
    candidates.ranked = step->ranked;
    candidates.tokens = step->guesses;
    candidates.indices = engine->guessed;
    candidates.log_p = step->log_p;
    candidates.bias = engine->heads->bias.rank ? &engine->heads->bias : NULL;
    return candidates;
}

void mc_guess(mc_worker *worker) {
    mc_engine *engine = worker->engine;
    int heads = engine->heads->heads;
    run_blocks(worker);
    run_lm_heads(worker);
    for (int k; (k = mc_team_next(engine->team, worker->index, heads)) >= 0;) rank(worker, k);
    mc_team_barrier(engine->team, worker->index);
}
