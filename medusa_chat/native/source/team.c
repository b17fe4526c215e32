#if defined(__linux__)
#define _GNU_SOURCE
#endif

#include "team.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "waiting.h"

enum {
    WAITED_SHARE = 3, /* a job is held up if its members wait at barriers for 1 / 3 of their time */
    HELD_UP = 16,     /* so many held up in succession tell of another busy program: */
    ALONE_JOBS = 128, /* so many then run on the caller alone, before it tries the team again */
    TRIES = 4         /* jobs of a try: members that slept long may take a while to wake */
};

/* Units that a member has taken of its own share. */
typedef struct {
    _Alignas(CACHE_LINE) int taken;
} own_share;

struct mc_team {
    int threads;
    int started; /* threads beside the caller that exist */
    pid_t process;
    pthread_t *members;
    own_share *shares; /* [threads] */
    mc_job job;
    void *context;
    int stopping;
    int held_up;  /* jobs in succession */
    int alone;    /* jobs left that the caller runs by itself */
    int is_alone; /* it does so now */
    atomic_llong waited; /* nanoseconds at the barriers of this job, of all members */
    signal_word round;   /* counts jobs */
    signal_word barrier; /* counts barriers passed */
    _Alignas(CACHE_LINE) atomic_int arrived;
    _Alignas(CACHE_LINE) atomic_int next;
};

typedef struct {
    mc_team *team;
    int index;
} membership;

/* Members that take part in the job. */
static int working(const mc_team *team) { return team->is_alone ? 1 : team->threads; }

void mc_team_barrier(mc_team *team, int index) {
    team->shares[index].taken = 0;
    if (working(team) == 1) {
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
        return;
    }
    unsigned passed = atomic_load(&team->barrier.value);
    if (atomic_fetch_add(&team->arrived, 1) == team->threads - 1) {
        atomic_store(&team->arrived, 0);
        atomic_store(&team->next, 0);
        advance(&team->barrier);
    } else {
        int64_t waited = wait_while(&team->barrier, passed);
        if (waited) {
            atomic_fetch_add(&team->waited, waited);
        }
    }
}

static int own_units(const mc_team *team, int units) { return units * 3 / (4 * working(team)); }

int mc_team_first(const mc_team *team, int index, int units) {
    return index * own_units(team, units);
}

int mc_team_next(mc_team *team, int index, int units) {
    int own = own_units(team, units);
    int *taken = &team->shares[index].taken;
    if (*taken < own) {
        return index * own + (*taken)++;
    }
    int unit = own * working(team) + atomic_fetch_add(&team->next, 1);
    return unit < units ? unit : -1;
}

static void *member_main(void *argument) {
    membership self = *(membership *)argument;
    free(argument);
    unsigned round = 0;
    for (;;) {
        wait_while(&self.team->round, round);
        round++;
        if (self.team->stopping) {
            return NULL;
        }
        self.team->job(self.team->context, self.team, self.index);
        mc_team_barrier(self.team, self.index);
    }
}

static int start_member(mc_team *team, int index) {
    membership *self = malloc(sizeof *self);
    if (!self) {
        return 0;
    }
    *self = (membership){team, index};
    if (pthread_create(&team->members[index], NULL, member_main, self) != 0) {
        free(self);
        return 0;
    }
    return 1;
}

/* Signals belong to the threads of the program: members inherit a mask that blocks all. */
static void start_members(mc_team *team) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (team->started < team->threads - 1 && start_member(team, team->started + 1)) {
        team->started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static mc_team *allocate(int threads) {
    size_t bytes = (sizeof(mc_team) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    mc_team *team = aligned_alloc(CACHE_LINE, bytes);
    if (!team) {
        return NULL;
    }
    *team = (mc_team){.threads = threads, .process = getpid()};
    team->members = calloc((size_t)threads, sizeof *team->members);
    team->shares = aligned_alloc(CACHE_LINE, (size_t)threads * sizeof *team->shares);
    if (!team->members || !team->shares) {
        free(team->members);
        free(team->shares);
        free(team);
        return NULL;
    }
    memset(team->shares, 0, (size_t)threads * sizeof *team->shares);
    word_open(&team->round);
    word_open(&team->barrier);
    return team;
}

mc_team *mc_team_new(int threads) {
    mc_team *team = threads > 0 ? allocate(threads) : NULL;
    if (!team) {
        return NULL;
    }
    start_members(team);
    if (team->started < threads - 1) {
        mc_team_free(team);
        return NULL;
    }
    return team;
}

/* A child of fork has none of the threads; what they held is left alone. */
static void become_alone(mc_team *team) {
    team->process = getpid();
    team->threads = 1;
    team->started = 0;
    team->shares[0].taken = 0;
    team->alone = 0;
    atomic_store(&team->arrived, 0);
    atomic_store(&team->next, 0);
}

void mc_team_free(mc_team *team) {
    if (!team) {
        return;
    }
    if (team->process != getpid()) {
        become_alone(team);
    }
    team->stopping = 1;
    advance(&team->round);
    for (int index = 1; index <= team->started; index++) {
        pthread_join(team->members[index], NULL);
    }
    word_close(&team->round);
    word_close(&team->barrier);
    free(team->members);
    free(team->shares);
    free(team);
}

int mc_team_threads(const mc_team *team) { return team->threads; }

/* Members whose cores another program uses hold up every barrier: one thread is faster then. */
static void run_alone(mc_team *team, mc_job job, void *context) {
    team->is_alone = 1;
    job(context, team, 0);
    mc_team_barrier(team, 0);
    team->is_alone = 0;
}

void mc_team_run(mc_team *team, mc_job job, void *context) {
    if (team->process != getpid()) {
        become_alone(team);
    }
    if (team->alone > 0) {
        team->alone--;
        run_alone(team, job, context);
        return;
    }
    int64_t begin = nanoseconds();
    team->job = job;
    team->context = context;
    atomic_store(&team->next, 0);
    if (team->threads > 1) {
        advance(&team->round);
    }
    job(context, team, 0);
    mc_team_barrier(team, 0);
    int64_t taken = (nanoseconds() - begin) * team->threads;
    int is_held_up = atomic_exchange(&team->waited, 0) > taken / WAITED_SHARE;
    team->held_up = is_held_up ? team->held_up + 1 : 0;
    if (team->held_up >= HELD_UP) {
        team->alone = ALONE_JOBS;
        team->held_up = HELD_UP - TRIES;
    }
}
