/* Plain C: the twin that the other variants are tested against. */
#define MC_ROWS 4
#define MC_WIDE_ROWS 0
#define MC_CODE_OFFSET 128

typedef struct { float lane[16]; } floats;
typedef struct { int32_t lane[16]; } ints;
typedef struct { uint8_t byte[64]; } codes;
typedef struct { float even[16], odd[16]; } pairs;
typedef struct { float even, odd; } inputs2;
typedef float mc_bfloat16_input;

MC_INLINE floats floats_splat(float value) {
    floats result;
    for (int lane = 0; lane < 16; lane++) {
        result.lane[lane] = value;
    }
    return result;
}

MC_INLINE floats floats_load(const void *from) {
    floats result;
    memcpy(&result, from, sizeof result);
    return result;
}

MC_INLINE void floats_store(float *to, floats value) { memcpy(to, &value, sizeof value); }

MC_INLINE floats floats_add(floats a, floats b) {
    for (int lane = 0; lane < 16; lane++) {
        a.lane[lane] += b.lane[lane];
    }
    return a;
}

MC_INLINE floats floats_multiply(floats a, floats b) {
    for (int lane = 0; lane < 16; lane++) {
        a.lane[lane] *= b.lane[lane];
    }
    return a;
}

/* sum + a b. Two roundings: without hardware for it, fmaf is a slow call. */
MC_INLINE floats floats_fma(floats a, floats b, floats sum) {
    return floats_add(sum, floats_multiply(a, b));
}

MC_INLINE ints ints_splat(int32_t value) {
    ints result;
    for (int lane = 0; lane < 16; lane++) {
        result.lane[lane] = value;
    }
    return result;
}

MC_INLINE floats floats_of_ints(ints value) {
    floats result;
    for (int lane = 0; lane < 16; lane++) {
        result.lane[lane] = (float)value.lane[lane];
    }
    return result;
}

MC_INLINE codes codes_load(const uint8_t *from) {
    codes result;
    memcpy(&result, from, sizeof result);
    return result;
}

#if MC_ACTIVATION_BITS == 16
#define MC_INPUTS_IN_PAIRS
typedef struct { int16_t value[4]; } inputs4;
enum { MC_SECOND = 2, MC_THIRD = 1 };
#else
typedef struct { int8_t value[4]; } inputs4;
enum { MC_SECOND = 1, MC_THIRD = 2 };
#endif

MC_INLINE inputs4 inputs4_load(const void *from) {
    inputs4 result;
    memcpy(&result, from, sizeof result);
    return result;
}

MC_INLINE ints ints_dot(ints sum, codes weights, inputs4 x) {
    for (int lane = 0; lane < 16; lane++) {
        const uint8_t *code = weights.byte + lane * 4;
        sum.lane[lane] += code[0] * x.value[0] + code[1] * x.value[MC_SECOND]
                        + code[2] * x.value[MC_THIRD] + code[3] * x.value[3];
    }
    return sum;
}

MC_INLINE float mc_widen(uint32_t bits) {
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

MC_INLINE pairs pairs_load(const void *from) {
    uint32_t words[16];
    pairs result;
    memcpy(words, from, sizeof words);
    for (int lane = 0; lane < 16; lane++) {
        result.even[lane] = mc_widen(words[lane] << 16);
        result.odd[lane] = mc_widen(words[lane] & 0xffff0000);
    }
    return result;
}

MC_INLINE inputs2 inputs2_load(const mc_bfloat16_input *from) {
    inputs2 result = {from[0], from[1]};
    return result;
}

MC_INLINE floats floats_dot(floats sum, pairs weights, inputs2 x) {
    for (int lane = 0; lane < 16; lane++) {
        sum.lane[lane] += weights.even[lane] * x.even;
    }
    for (int lane = 0; lane < 16; lane++) {
        sum.lane[lane] += weights.odd[lane] * x.odd;
    }
    return sum;
}

typedef struct { uint8_t value[16]; } nf4_table;

MC_INLINE nf4_table nf4_table_of(const uint8_t *values) {
    nf4_table result;
    memcpy(&result, values, sizeof result);
    return result;
}

MC_INLINE codes nf4_load(nf4_table table, const uint8_t *chunk, int high) {
    codes result;
    for (int byte = 0; byte < 64; byte++) {
        result.byte[byte] = table.value[high ? chunk[byte] >> 4 : chunk[byte] & 15];
    }
    return result;
}
