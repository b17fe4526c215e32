/* Operations on single rows; included once for each family of processors, behind its vectors. */
#include <math.h>
#include <string.h>

#include "operations.h"
#include "vector.h"
#include "vector_math.h"

#define SIZE 16 /* of a vector */

/* `count` numbers and zeros behind them. */
static inline vector load_some(const float *from, int count) {
    float padded[SIZE] = {0};
    memcpy(padded, from, (size_t)count * sizeof *from);
    return vector_load(padded);
}

static inline void store_some(float *to, vector v, int count) {
    float padded[SIZE];
    vector_store(padded, v);
    memcpy(to, padded, (size_t)count * sizeof *to);
}

static inline vector load_up_to(const float *from, int count) {
    return count >= SIZE ? vector_load(from) : load_some(from, count);
}

static inline void store_up_to(float *to, vector v, int count) {
    if (count >= SIZE) vector_store(to, v);
    else store_some(to, v, count);
}

static vector load_as(const void *from, mc_format format, int first, int count) {
    if (format == MC_FLOAT32) return load_up_to((const float *)from + first, count);
    const uint16_t *half = (const uint16_t *)from + first;
    if (count >= SIZE) return vector_load_bfloat16(half);
    uint16_t padded[SIZE] = {0};
    memcpy(padded, half, (size_t)count * sizeof *half);
    return vector_load_bfloat16(padded);
}

static void embed(const void *row, mc_format format, int size, float scale, float *x) {
    for (int i = 0; i < size; i += SIZE) {
        vector v = load_as(row, format, i, size - i);
        store_up_to(x + i, vector_multiply(v, vector_all(scale)), size - i);
    }
}

static void store(const float *x, int size, mc_format format, void *to) {
    if (format == MC_FLOAT32) {
        memcpy(to, x, (size_t)size * sizeof *x);
        return;
    }
    uint16_t *half = to;
    int i = 0;
    for (; i + SIZE <= size; i += SIZE) vector_store_bfloat16(half + i, vector_load(x + i));
    if (i < size) {
        uint16_t padded[SIZE];
        vector_store_bfloat16(padded, load_some(x + i, size - i));
        memcpy(half + i, padded, (size_t)(size - i) * sizeof *half);
    }
}

static void add(float *x, const float *y, int size) {
    for (int i = 0; i < size; i += SIZE) {
        vector sum = vector_add(load_up_to(x + i, size - i), load_up_to(y + i, size - i));
        store_up_to(x + i, sum, size - i);
    }
}

static void norm(const float *x, const float *weight, int size, float epsilon, float *y) {
    vector squares = vector_all(0.0f);
    for (int i = 0; i < size; i += SIZE) {
        vector v = load_up_to(x + i, size - i);
        squares = vector_multiply_add(v, v, squares);
    }
    vector scale = vector_all(1.0f / sqrtf(vector_sum(squares) / (float)size + epsilon));
    for (int i = 0; i < size; i += SIZE) {
        vector v = vector_multiply(load_up_to(x + i, size - i), scale);
        store_up_to(y + i, vector_multiply(v, load_up_to(weight + i, size - i)), size - i);
    }
}

static void rotate(float *x, const float *cosine, const float *sine, int half) {
    for (int i = 0; i < half; i += SIZE) {
        int left = half - i;
        vector a = load_up_to(x + i, left), b = load_up_to(x + half + i, left);
        vector c = load_up_to(cosine + i, left), s = load_up_to(sine + i, left);
        vector turned = vector_subtract(vector_multiply(a, c), vector_multiply(b, s));
        vector other = vector_add(vector_multiply(b, c), vector_multiply(a, s));
        store_up_to(x + i, turned, left);
        store_up_to(x + half + i, other, left);
    }
}

static void gate_rows(mc_activation activation, float *gate, const float *up, int size) {
    for (int i = 0; i < size; i += SIZE) {
        vector v = load_up_to(gate + i, size - i);
        v = activation == MC_SILU ? vector_silu(v) : vector_gelu(v);
        store_up_to(gate + i, vector_multiply(v, load_up_to(up + i, size - i)), size - i);
    }
}

static void add_silu(float *x, const float *y, int size) {
    for (int i = 0; i < size; i += SIZE) {
        vector grown = vector_silu(load_up_to(y + i, size - i));
        store_up_to(x + i, vector_add(load_up_to(x + i, size - i), grown), size - i);
    }
}

static void cap(float *x, float most, int size) {
    for (int i = 0; i < size; i += SIZE)
        store_up_to(x + i, vector_capped(load_up_to(x + i, size - i), most), size - i);
}

static float largest(const float *x, int size) {
    vector most = vector_all(-INFINITY);
    int i = 0;
    for (; i + SIZE <= size; i += SIZE) most = vector_maximum(most, vector_load(x + i));
    float found = vector_largest(most);
    for (; i < size; i++) found = x[i] > found ? x[i] : found;
    return found;
}

static int first_above(const float *x, int size, float bound) {
    int i = 0;
    while (i + SIZE <= size && !vector_any_above(vector_load(x + i), bound)) i += SIZE;
    while (i < size && !(x[i] > bound)) i++;
    return i;
}

static float dot(const void *row, mc_format format, const float *x, int size) {
    vector sum = vector_all(0.0f);
    for (int i = 0; i < size; i += SIZE)
        sum = vector_multiply_add(load_as(row, format, i, size - i), load_up_to(x + i, size - i),
                                  sum);
    return vector_sum(sum);
}

static void dots(const void *matrix, mc_format format, const int32_t *rows, int count,
                 const float *x, int size, float *y) {
    size_t bytes = (size_t)size * (format == MC_FLOAT32 ? sizeof(float) : sizeof(uint16_t));
    for (int i = 0; i < count; i++)
        y[i] = dot((const char *)matrix + (size_t)rows[i] * bytes, format, x, size);
}

static float log_sum(const float *x, int size) {
    float most = largest(x, size);
    vector sum = vector_all(0.0f), off = vector_all(most);
    int i = 0;
    for (; i + SIZE <= size; i += SIZE)
        sum = vector_add(sum, vector_exponential(vector_subtract(vector_load(x + i), off)));
    float total = vector_sum(sum);
    for (; i < size; i++) total += expf(x[i] - most);
    return most + logf(total);
}
