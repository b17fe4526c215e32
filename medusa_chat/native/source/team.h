/* A team of threads that runs one job after another, the caller being its first member. */
#ifndef MEDUSA_TEAM_H
#define MEDUSA_TEAM_H

typedef struct mc_team mc_team;

/* A job runs on every member: index counts from 0 (the caller) to threads - 1. */
typedef void (*mc_job)(void *context, mc_team *team, int index);

mc_team *mc_team_new(int threads); /* NULL if threads cannot be made */
void mc_team_free(mc_team *team);
int mc_team_threads(const mc_team *team);
void mc_team_run(mc_team *team, mc_job job, void *context);

/* Inside a job: wait until all members are here. Spins briefly, then sleeps. */
void mc_team_barrier(mc_team *team, int index);

/* Inside a job: the next unit of work below `units` for a member, or -1 when none is left. Three
 * quarters are split beforehand, a run of units for each; the rest goes to whichever member asks
 * first. A member's units come in order; a barrier starts the count anew. */
int mc_team_next(mc_team *team, int index, int units);

/* The first unit of a member's own, known beforehand; some other unit if it has none. */
int mc_team_first(const mc_team *team, int index, int units);

#endif
