/* The operations of one variant. */
#include "attention.h"
#include "dispatch.h"

extern const mc_operations MC_VARIANT(mc_row_operations);

const mc_operations MC_VARIANT(mc_row_operations) = {
    .embed = embed,
    .store = store,
    .add = add,
    .norm = norm,
    .rotate = rotate,
    .gate = gate_rows,
    .add_silu = add_silu,
    .cap = cap,
    .largest = largest,
    .first_above = first_above,
    .log_sum = log_sum,
    .dots = dots,
    .attend_scratch = attend_scratch,
    .attend = attend,
};
