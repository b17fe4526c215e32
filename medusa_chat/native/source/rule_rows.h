/* What a rule does over a whole vocabulary, for one family of processors. */
#ifndef MEDUSA_RULE_ROWS_H
#define MEDUSA_RULE_ROWS_H

#include <stdint.h>

#include "noise.h"

typedef struct {
    void (*temper)(float *x, int size, float temperature);
    void (*penalize)(const float *logits, const float *prompt, const float *reply, int size,
                     float repetition, float presence, float frequency, float *y);
    int (*finite)(const float *x, int size); /* no number is NaN or infinite */
    /* The first place from `first` on whose noise may lift its score above `best`, or `size`. */
    int (*next_hit)(const float *scores, const int32_t *token_keys, uint32_t row_key, int first,
                    int size, float best);
    /* Sum of e^(x - off) over the x above `cut`, and of e^(x - off) (x - off). */
    void (*sums)(const float *x, int size, float off, float cut, double *sum, double *weighted);
} mc_rule_rows;

const mc_rule_rows *mc_rule_rows_here(void);

#endif
