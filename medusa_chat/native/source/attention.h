/* Attention over the logical positions of each row, in order: text, then the row's path.
 *
 * Included once for each family of processors, behind elementwise.h. A query's scores stand at
 * their position modulo 16, so that each is added to the same lane wherever the text ends; its
 * values are added position by position. Weights outside of what a row sees are zero, and to add
 * zero times a number changes nothing: so queries can share each tile of keys and values.
 */
#include "elementwise.h"

typedef struct {
    const mc_attention *a;
    int padded;     /* head_dim, up to whole vectors */
    int first, count; /* queries */
    int base;       /* position of the first score, a multiple of 16 */
    int common;     /* positions before it are in slots of the same number for all queries */
    int stride;     /* of scores */
    float *queries; /* [count, padded] */
    float *sums;    /* [count, padded] */
    float *tile;    /* [16, padded] */
    float *columns; /* [padded, 16], of keys */
    float *scores;  /* [count, stride] */
} block;

static int whole(int size) { return (size + SIZE - 1) / SIZE * SIZE; }
static int row_of(const block *b, int query) { return (b->first + query) / b->a->group; }
static int position_of(const block *b, int query) {
    return b->a->start + b->a->depth[row_of(b, query)];
}

static int lowest_of(const block *b, int query) {
    int lowest = position_of(b, query) - b->a->window + 1;
    return b->a->window && lowest > 0 ? lowest : 0;
}

/* Where this query's numbers start in a row of queries or of what is mixed. */
static size_t offset_of(const block *b, int query, size_t stride) {
    int head = (b->first + query) % b->a->group;
    return (size_t)row_of(b, query) * stride + (size_t)head * (size_t)b->a->head_dim;
}

static void load_row(const block *b, const void *from, int slot, float *to) {
    const mc_attention *a = b->a;
    size_t bytes = a->format == MC_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
    const char *row = (const char *)from + (size_t)slot * (size_t)a->head_dim * bytes;
    for (int i = 0; i < b->padded; i += SIZE)
        vector_store(to + i, load_as(row, a->format, i, a->head_dim - i));
}

/* The tile's rows as columns, so that a vector holds one number of 16 keys. */
static void turn_tile(block *b) {
    for (int i = 0; i < b->padded; i += SIZE)
        vector_transpose(b->tile + i, b->padded, b->columns + i * SIZE);
}

/* Sixteen scores of each of a few queries: the sum of the first half and of the second one. */
static inline void score_some(const float *queries, const float *columns, int padded,
                              vector *scores, const int count) {
    vector second[QUERIES_AT_ONCE];
    int half = padded / 2;
    for (int query = 0; query < count; query++) scores[query] = second[query] = vector_all(0.0f);
    for (int i = 0; i < half; i++) {
        vector low = vector_load(columns + i * SIZE);
        vector high = vector_load(columns + (half + i) * SIZE);
        for (int query = 0; query < count; query++) {
            const float *x = queries + query * padded + i;
            scores[query] = vector_multiply_add(vector_all(x[0]), low, scores[query]);
            second[query] = vector_multiply_add(vector_all(x[half]), high, second[query]);
        }
    }
    for (int query = 0; query < count; query++)
        scores[query] = vector_add(scores[query], second[query]);
}

/* Scores of queries first to last - 1 with `keys` rows of the tile, from `place` on. */
static void score_queries(block *b, int first, int last, int place, int keys) {
    turn_tile(b);
    for (int query = first, count; query < last; query += count) {
        vector scores[QUERIES_AT_ONCE];
        const float *queries = b->queries + query * b->padded;
        count = last - query < QUERIES_AT_ONCE ? 1 : QUERIES_AT_ONCE;
        /* A constant count lets the compiler keep the scores in registers. */
        if (count == 1) score_some(queries, b->columns, b->padded, scores, 1);
        else score_some(queries, b->columns, b->padded, scores, QUERIES_AT_ONCE);
        float *to = b->scores + (size_t)query * (size_t)b->stride + place;
        for (int i = 0; i < count; i++)
            store_up_to(to + (size_t)i * (size_t)b->stride, scores[i], keys);
    }
}

static void score_common(block *b) {
    for (int position = b->base; position < b->common; position += SIZE) {
        for (int i = 0; i < SIZE && position + i < b->common; i++)
            load_row(b, b->a->keys, position + i, b->tile + i * b->padded);
        score_queries(b, 0, b->count, position - b->base, SIZE);
    }
}

/* Loads up to 16 rows of a path from depth `depth` on; returns how many. */
static int load_path(block *b, int row, int depth, const void *from) {
    int count = b->a->depth[row] + 1 - depth;
    count = count < SIZE ? count : SIZE;
    for (int i = 0; i < count; i++)
        load_row(b, from, b->a->start + b->a->path[row][depth + i], b->tile + i * b->padded);
    return count;
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

/* Adds weights times the first `count` rows of the tile, a few vectors of two queries at a time. */
static inline void mix_part(const float *one, const float *two, const float *tile, int count,
                            int padded, float *to, float *other, const int vectors) {
    vector a[VECTORS_AT_ONCE], c[VECTORS_AT_ONCE];
    for (int j = 0; j < vectors; j++) a[j] = vector_load(to + j * SIZE);
    for (int j = 0; j < vectors; j++) c[j] = vector_load(other + j * SIZE);
    for (int row = 0; row < count; row++) {
        vector x = vector_all(one[row]), y = vector_all(two[row]);
        for (int j = 0; j < vectors; j++) {
            vector value = vector_load(tile + row * padded + j * SIZE);
            a[j] = vector_multiply_add(x, value, a[j]);
            c[j] = vector_multiply_add(y, value, c[j]);
        }
    }
    for (int j = 0; j < vectors; j++) vector_store(to + j * SIZE, a[j]);
    for (int j = 0; j < vectors; j++) vector_store(other + j * SIZE, c[j]);
}

static void mix_pair(const float *one, const float *two, const float *tile, int count, int padded,
                     float *to, float *other) {
    int i = 0, step = VECTORS_AT_ONCE * SIZE;
    for (; i + step <= padded; i += step)
        mix_part(one, two, tile + i, count, padded, to + i, other + i, VECTORS_AT_ONCE);
    for (; i < padded; i += SIZE)
        mix_part(one, two, tile + i, count, padded, to + i, other + i, 1);
}

/* Adds the tile's values to queries first to last - 1, by their weights from `place` on. */
static void mix_tile(block *b, int first, int last, int place, int count) {
    float spare[256];
    for (int query = first; query < last; query += 2) {
        int other = query + 1 < last ? query + 1 : query;
        float *to = b->sums + query * b->padded, *next = b->sums + other * b->padded;
        if (other == query) next = memcpy(spare, to, (size_t)b->padded * sizeof *to);
        const float *one = b->scores + (size_t)query * (size_t)b->stride + place;
        const float *two = b->scores + (size_t)other * (size_t)b->stride + place;
        mix_pair(one, two, b->tile, count, b->padded, to, next);
    }
}

static void mix_common(block *b) {
    for (int position = b->base; position < b->common; position += SIZE) {
        int count = b->common - position < SIZE ? b->common - position : SIZE;
        for (int i = 0; i < count; i++)
            load_row(b, b->a->values, position + i, b->tile + i * b->padded);
        mix_tile(b, 0, b->count, position - b->base, count);
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
    return (size_t)queries * (2 * padded + (size_t)positions + 4 * SIZE) + 2 * SIZE * padded;
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
    b->columns = b->tile + SIZE * b->padded;
    b->queries = b->columns + SIZE * b->padded;
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
