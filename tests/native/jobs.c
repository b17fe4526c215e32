/* Jobs for tests of the team: Python's own functions cannot run on its threads quickly enough. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#include "team.h"

typedef struct {
    int phases;
    int units;
    int busy_nanoseconds; /* of a unit; it sleeps for as long if they are below 0 */
    int failed;           /* units not done exactly once when a phase ended */
    atomic_int done[4096];
    int members[64]; /* units that each member took */
    int signals_open; /* members other than the caller that take signals */
} counting;

static void be_busy(int nanoseconds) {
    struct timespec now = {0, -nanoseconds};
    if (nanoseconds < 0) {
        nanosleep(&now, NULL);
        return;
    }
    clock_gettime(CLOCK_MONOTONIC, &now);
    long long end = now.tv_sec * 1000000000LL + now.tv_nsec + nanoseconds;
    do {
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec * 1000000000LL + now.tv_nsec < end);
}

static int takes_signals(void) {
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    return !sigismember(&mask, SIGINT);
}

static void count(void *context, mc_team *team, int index) {
    counting *self = context;
    if (index > 0 && takes_signals()) {
        self->signals_open = 1;
    }
    for (int phase = 0; phase < self->phases; phase++) {
        for (int unit; (unit = mc_team_next(team, index, self->units)) >= 0;) {
            atomic_fetch_add(&self->done[unit], 1);
            self->members[index]++;
            be_busy(self->busy_nanoseconds);
        }
        mc_team_barrier(team, index);
        for (int unit = 0; unit < self->units; unit++) {
            if (atomic_load(&self->done[unit]) != phase + 1) {
                self->failed++;
            }
        }
        mc_team_barrier(team, index);
    }
}

/* Seconds that a job of many phases takes; -1 where a unit was skipped or done twice. */
double count_units(mc_team *team, int phases, int units, int busy_nanoseconds, int *members) {
    static _Thread_local counting work;
    struct timespec begin;
    struct timespec end;
    work = (counting){.phases = phases, .units = units, .busy_nanoseconds = busy_nanoseconds};
    clock_gettime(CLOCK_MONOTONIC, &begin);
    mc_team_run(team, count, &work);
    clock_gettime(CLOCK_MONOTONIC, &end);
    for (int index = 0; members && index < mc_team_threads(team); index++) {
        members[index] = work.members[index];
    }
    double seconds = (double)(end.tv_sec - begin.tv_sec) + (end.tv_nsec - begin.tv_nsec) * 1e-9;
    return work.failed || work.signals_open ? -1 : seconds;
}
