/* Sixteen floats at a time, in the registers that a variant has: what attention and the operations
 * on rows are written in. Sums of lanes have one order, the same in every variant.
 *
 * The registers hold VECTORS_AT_ONCE sums of each of QUERIES_AT_ONCE queries, or two for each of
 * TILES_AT_ONCE tiles of keys. */
#if defined(MC_AVX512)
#include "vector_avx512.h"
#elif defined(MC_AVX2)
#include "vector_avx2.h"
#elif defined(MC_ARM)
#include "vector_arm.h"
#else
#include "vector_portable.h"
#endif
