/* Chooses the operations for this processor. */
#include "operations.h"

#include "dispatch.h"

MC_DECLARE_VARIANTS(mc_operations, mc_row_operations);

static const mc_operations *const variants[] = MC_VARIANTS(mc_row_operations);

const mc_operations *mc_operations_here(void) { return variants[mc_variant_index()]; }
