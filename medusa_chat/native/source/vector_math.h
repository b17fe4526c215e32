/* Exponentials over vectors; the same for a number in whichever lane it stands. */
#ifndef MEDUSA_VECTOR_MATH_H
#define MEDUSA_VECTOR_MATH_H

/* e^x within two units in the last place; 0 below -87. The polynomial is that of Cephes' expf. */
static inline vector vector_exponential(vector x) {
    vector bounded = vector_maximum(vector_minimum(x, vector_all(88.0f)), vector_all(-87.0f));
    vector n = vector_round(vector_multiply(bounded, vector_all(1.44269504088896341f)));
    vector r = vector_multiply_add(n, vector_all(-0.693359375f), bounded);
    r = vector_multiply_add(n, vector_all(2.12194440e-4f), r);
    vector y = vector_all(1.9875691500e-4f);
    y = vector_multiply_add(y, r, vector_all(1.3981999507e-3f));
    y = vector_multiply_add(y, r, vector_all(8.3334519073e-3f));
    y = vector_multiply_add(y, r, vector_all(4.1665795894e-2f));
    y = vector_multiply_add(y, r, vector_all(1.6666665459e-1f));
    y = vector_multiply_add(y, r, vector_all(5.0000001201e-1f));
    y = vector_multiply_add(vector_multiply(r, r), y, r);
    y = vector_add(y, vector_all(1.0f));
    return vector_zero_below(x, -87.0f, vector_scale(y, n));
}

/* x / (1 + e^-x) */
static inline vector vector_silu(vector x) {
    vector e = vector_exponential(vector_subtract(vector_all(0.0f), x));
    return vector_divide(x, vector_add(vector_all(1.0f), e));
}

/* GELU with its tanh: x (1 + tanh u) / 2 = x / (1 + e^-2u). */
static inline vector vector_gelu(vector x) {
    vector square = vector_multiply(x, x);
    vector inner = vector_multiply_add(square, vector_all(0.044715f), vector_all(1.0f));
    vector u = vector_multiply(vector_multiply(x, inner), vector_all(-1.5957691216057308f));
    vector e = vector_exponential(u);
    return vector_divide(x, vector_add(vector_all(1.0f), e));
}

static inline vector vector_tanh(vector x) {
    vector e = vector_exponential(vector_multiply(x, vector_all(2.0f)));
    vector rest = vector_divide(vector_all(2.0f), vector_add(e, vector_all(1.0f)));
    return vector_subtract(vector_all(1.0f), rest);
}

/* cap * tanh(x / cap) */
static inline vector vector_capped(vector x, float cap) {
    vector inner = vector_multiply(x, vector_all(1.0f / cap));
    return vector_multiply(vector_tanh(inner), vector_all(cap));
}

#endif
