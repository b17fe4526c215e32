/* A check at load that the variant in use computes what the portable one does. */
#ifndef MEDUSA_CHECK_H
#define MEDUSA_CHECK_H

/* 1 if they agree within the rounding of each format; 0 otherwise, or without memory. Not while
 * kernels run. */
int mc_check(void);

#endif
