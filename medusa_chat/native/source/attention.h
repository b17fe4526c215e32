/* Attention over the logical positions of each row, in order: text, then the row's path.
 *
 * Included once for each family of processors. A query's scores stand at their position modulo 16,
 * so that each is added to the same lane wherever the text ends; its values are added position by
 * position. Weights outside of what a row sees are zero, and to add zero times a number changes
 * nothing: so queries can share each tile of keys and values.
 */
#include "attention_block.h"

enum {
    MOST_AT_ONCE = 4, /* queries, in any variant */
    AHEAD = 64,       /* positions by which keys are fetched before they are met */
};

static int at_once(int left) { return left < QUERIES_AT_ONCE ? left : QUERIES_AT_ONCE; }

/* Runs a function for the next of `left` queries: a constant number of them lets the compiler keep
 * their sums in registers. */
#define FOR_NEXT(left, function, ...)        \
    switch (at_once(left)) {                 \
    case 1: function(__VA_ARGS__, 1); break; \
    case 2: function(__VA_ARGS__, 2); break; \
    case 3: function(__VA_ARGS__, 3); break; \
    default: function(__VA_ARGS__, 4);       \
    }

/* Sixteen scores of each of a few queries with each tile: the sum of the first half of a key and
 * of the second one. */
MC_INLINE void score_few(const block *b, int query, float *to, int keys, const int tiles,
                         const int count) {
    vector sums[MOST_AT_ONCE][TILES_AT_ONCE][2], column[TILES_AT_ONCE][2];
    int half = b->padded / 2, size = b->padded * SIZE;
    const float *x = b->queries + query * b->padded;
    for (int q = 0; q < count; q++)
        for (int t = 0; t < tiles; t++) sums[q][t][0] = sums[q][t][1] = vector_all(0.0f);
    for (int i = 0; i < half; i++) {
        for (int t = 0; t < tiles; t++) {
            column[t][0] = vector_load(b->columns + t * size + i * SIZE);
            column[t][1] = vector_load(b->columns + t * size + (half + i) * SIZE);
        }
        for (int q = 0; q < count; q++) {
            vector low = vector_all(x[q * b->padded + i]);
            vector high = vector_all(x[q * b->padded + half + i]);
            for (int t = 0; t < tiles; t++) {
                sums[q][t][0] = vector_multiply_add(low, column[t][0], sums[q][t][0]);
                sums[q][t][1] = vector_multiply_add(high, column[t][1], sums[q][t][1]);
            }
        }
    }
    for (int q = 0; q < count; q++)
        for (int t = 0; t < tiles; t++)
            store_up_to(to + q * b->stride + t * SIZE, vector_add(sums[q][t][0], sums[q][t][1]),
                        keys - t * SIZE);
}

/* Scores of queries first to last - 1 with `keys` columns, from `place` on. */
static void score_queries(const block *b, int first, int last, int place, int keys) {
    for (int query = first; query < last; query += QUERIES_AT_ONCE) {
        float *to = b->scores + (size_t)query * (size_t)b->stride + place;
        if (keys > SIZE) {
            FOR_NEXT(last - query, score_few, b, query, to, keys, TILES_AT_ONCE)
        } else {
            FOR_NEXT(last - query, score_few, b, query, to, keys, 1)
        }
    }
}

/* The first query of a chain that sees a position; each one sees the text before the chain. */
static int first_that_sees(const block *b, int position) {
    int before = (position - b->a->start) * b->a->group - b->first;
    return before > 0 ? before : 0;
}

static void score_common(block *b) {
    for (int position = b->base, tiles; position < b->common; position += tiles * SIZE) {
        tiles = b->common - position > SIZE ? TILES_AT_ONCE : 1;
        for (int tile = 0; tile < tiles; tile++) {
            int slot = position + tile * SIZE;
            fetch_rows(b, b->a->keys, slot + AHEAD);
            fetch_rows(b, b->a->values, slot);
            turn_text(b, slot, b->columns + tile * b->padded * SIZE);
        }
        int first = first_that_sees(b, position);
        score_queries(b, first, b->count, position - b->base, tiles * SIZE);
    }
}

/* The query behind the last one of the same row. */
static int end_of_row(const block *b, int query) {
    int end = (row_of(b, query) + 1) * b->a->group - b->first;
    return end < b->count ? end : b->count;
}

static void score_paths(block *b) {
    for (int query = 0, end; query < b->count; query = end) {
        int row = row_of(b, query);
        end = end_of_row(b, query);
        for (int depth = 0; depth <= b->a->depth[row]; depth += SIZE) {
            int count = load_path(b, row, depth, b->a->keys);
            turn_tile(b, b->columns);
            score_queries(b, query, end, b->a->start + depth - b->base, count);
        }
    }
}

/* Turns the scores of a query into weights, zeros outside of what it sees; returns their sum. */
static float weigh(block *b, int query) {
    const mc_attention *a = b->a;
    float *scores = b->scores + (size_t)query * (size_t)b->stride;
    int from = lowest_of(b, query) - b->base, to = position_of(b, query) - b->base + 1;
    int begin = from / SIZE * SIZE, end = whole(to);
    for (int i = begin; i < from; i++) scores[i] = -INFINITY;
    for (int i = to; i < end; i++) scores[i] = -INFINITY;
    vector most = vector_all(-INFINITY), scale = vector_all(a->scale);
    for (int i = begin; i < end; i += SIZE) {
        vector v = vector_multiply(vector_load(scores + i), scale);
        if (a->cap > 0) v = vector_capped(v, a->cap);
        vector_store(scores + i, v);
        most = vector_maximum(most, v);
    }
    /* The cap made numbers of what lies outside. */
    for (int i = begin; i < from; i++) scores[i] = -INFINITY;
    for (int i = to; i < end; i++) scores[i] = -INFINITY;
    vector off = vector_all(vector_largest(most)), sum = vector_all(0.0f);
    for (int i = begin; i < end; i += SIZE) {
        vector v = vector_exponential(vector_subtract(vector_load(scores + i), off));
        vector_store(scores + i, v);
        sum = vector_add(sum, v);
    }
    if (begin) memset(scores, 0, (size_t)begin * sizeof *scores);
    memset(scores + end, 0, (size_t)(b->stride - end) * sizeof *scores);
    return vector_sum(sum);
}

/* Adds weights times rows of the tile to a few queries, some vectors of them at a time. */
MC_INLINE void mix_part(const block *b, int query, const float *weights, int rows, int first,
                        const int vectors, const int count) {
    vector sums[MOST_AT_ONCE][VECTORS_AT_ONCE], value[VECTORS_AT_ONCE];
    float *to = b->sums + query * b->padded + first;
    for (int q = 0; q < count; q++)
        for (int j = 0; j < vectors; j++)
            sums[q][j] = vector_load(to + q * b->padded + j * SIZE);
    for (int row = 0; row < rows; row++) {
        for (int j = 0; j < vectors; j++)
            value[j] = vector_load(b->tile + row * b->padded + first + j * SIZE);
        for (int q = 0; q < count; q++) {
            vector weight = vector_all(weights[q * b->stride + row]);
            for (int j = 0; j < vectors; j++)
                sums[q][j] = vector_multiply_add(weight, value[j], sums[q][j]);
        }
    }
    for (int q = 0; q < count; q++)
        for (int j = 0; j < vectors; j++)
            vector_store(to + q * b->padded + j * SIZE, sums[q][j]);
}

MC_INLINE void mix_few(const block *b, int query, const float *weights, int rows,
                       const int count) {
    int i = 0, step = VECTORS_AT_ONCE * SIZE;
    for (; i + step <= b->padded; i += step)
        mix_part(b, query, weights, rows, i, VECTORS_AT_ONCE, count);
    for (; i < b->padded; i += SIZE) mix_part(b, query, weights, rows, i, 1, count);
}

/* Adds the tile's values to queries first to last - 1, by their weights from `place` on. */
static void mix_tile(const block *b, int first, int last, int place, int rows) {
    for (int query = first; query < last; query += QUERIES_AT_ONCE) {
        const float *weights = b->scores + (size_t)query * (size_t)b->stride + place;
        FOR_NEXT(last - query, mix_few, b, query, weights, rows)
    }
}

static void mix_common(block *b) {
    const int most = TILES_AT_ONCE * SIZE;
    for (int position = b->base; position < b->common; position += most) {
        int count = b->common - position < most ? b->common - position : most;
        load_rows(b, b->a->values, position, count);
        mix_tile(b, first_that_sees(b, position), b->count, position - b->base, count);
    }
}

static void mix_paths(block *b) {
    for (int query = 0, end; query < b->count; query = end) {
        int row = row_of(b, query);
        end = end_of_row(b, query);
        for (int depth = 0; depth <= b->a->depth[row]; depth += SIZE) {
            int count = load_path(b, row, depth, b->a->values);
            mix_tile(b, query, end, b->a->start + depth - b->base, count);
        }
    }
}

static size_t attend_scratch(int queries, int positions, int head_dim) {
    size_t padded = (size_t)whole(head_dim);
    return (size_t)queries * (2 * padded + (size_t)positions + 4 * SIZE) +
           2 * TILES_AT_ONCE * SIZE * padded;
}

static void lay_out(block *b, float *scratch) {
    const mc_attention *a = b->a;
    int lowest = lowest_of(b, 0), highest = 0;
    for (int query = 0; query < b->count; query++) {
        int low = lowest_of(b, query), high = position_of(b, query);
        lowest = low < lowest ? low : lowest;
        highest = high > highest ? high : highest;
    }
    b->padded = whole(a->head_dim);
    b->base = lowest / SIZE * SIZE;
    b->common = a->path ? a->start : highest + 1;
    b->stride = whole(highest + 1 - b->base) + SIZE;
    b->tile = scratch;
    b->columns = b->tile + TILES_AT_ONCE * SIZE * b->padded;
    b->queries = b->columns + TILES_AT_ONCE * SIZE * b->padded;
    b->sums = b->queries + b->count * b->padded;
    b->scores = b->sums + b->count * b->padded;
    for (int query = 0; query < b->count; query++) {
        const float *from = a->queries + offset_of(b, query, a->query_stride);
        for (int i = 0; i < b->padded; i += SIZE)
            vector_store(b->queries + query * b->padded + i, load_up_to(from + i, a->head_dim - i));
    }
    memset(b->sums, 0, (size_t)b->count * (size_t)b->padded * sizeof(float));
    memset(b->tile, 0, SIZE * (size_t)b->padded * sizeof(float));
}

static void attend(const mc_attention *attention, int first, int last, float *scratch) {
    block b = {.a = attention, .first = first, .count = last - first};
    float total[MC_QUERIES];
    lay_out(&b, scratch);
    score_common(&b);
    if (attention->path) score_paths(&b);
    for (int query = 0; query < b.count; query++) total[query] = weigh(&b, query);
    mix_common(&b);
    if (attention->path) mix_paths(&b);
    for (int query = 0; query < b.count; query++) {
        float *to = attention->mixed + offset_of(&b, query, attention->mixed_stride);
        vector scale = vector_all(1.0f / total[query]);
        for (int i = 0; i < attention->head_dim; i += SIZE) {
            vector v = vector_multiply(vector_load(b.sums + query * b.padded + i), scale);
            store_up_to(to + i, v, attention->head_dim - i);
        }
    }
}
