#if defined(__linux__)
#define _GNU_SOURCE
#endif

#include "team.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

enum {
    CACHE_LINE = 64,
    SPIN_NANOSECONDS = 30000,
    PAUSES_PER_CLOCK = 16,
    WAITED_SHARE = 4, /* a job is held up if its members wait at barriers for 1 / 4 of their time */
    HELD_UP = 3,      /* so many held up in succession tell of another busy program */
    ALONE_JOBS = 64   /* that the caller then runs by itself, before it tries the team again */
};

/* A number that threads wait on. */
typedef struct {
    _Alignas(CACHE_LINE) atomic_uint value;
    atomic_uint sleepers;
#if !defined(__linux__)
    pthread_mutex_t mutex;
    pthread_cond_t changed;
#endif
} signal_word;

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

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Whether the value changed while spinning; `begin` gets the time, once some of it has passed. */
static int spin(signal_word *word, unsigned old, int64_t *begin) {
    *begin = 0;
    for (unsigned count = 0;; count++) {
        if (atomic_load_explicit(&word->value, memory_order_acquire) != old) {
            return 1;
        }
        pause_briefly();
        if (count % PAUSES_PER_CLOCK == PAUSES_PER_CLOCK - 1) {
            int64_t now = nanoseconds();
            *begin = *begin ? *begin : now;
            if (now >= *begin + SPIN_NANOSECONDS) {
                return 0;
            }
        }
    }
}

#if defined(__linux__)
static void word_open(signal_word *word) { (void)word; }
static void word_close(signal_word *word) { (void)word; }

static void sleep_while(signal_word *word, unsigned old) {
    syscall(SYS_futex, &word->value, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
}

static void wake_all(signal_word *word) {
    syscall(SYS_futex, &word->value, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}
#else
static void word_open(signal_word *word) {
    pthread_mutex_init(&word->mutex, NULL);
    pthread_cond_init(&word->changed, NULL);
}

static void word_close(signal_word *word) {
    pthread_cond_destroy(&word->changed);
    pthread_mutex_destroy(&word->mutex);
}

static void sleep_while(signal_word *word, unsigned old) {
    pthread_mutex_lock(&word->mutex);
    if (atomic_load(&word->value) == old) {
        pthread_cond_wait(&word->changed, &word->mutex);
    }
    pthread_mutex_unlock(&word->mutex);
}

static void wake_all(signal_word *word) {
    pthread_mutex_lock(&word->mutex);
    pthread_cond_broadcast(&word->changed);
    pthread_mutex_unlock(&word->mutex);
}
#endif

/* Returns the nanoseconds that this took; 0 for a moment. */
static int64_t wait_while(signal_word *word, unsigned old) {
    int64_t begin;
    if (!spin(word, old, &begin)) {
        atomic_fetch_add(&word->sleepers, 1);
        while (atomic_load(&word->value) == old) {
            sleep_while(word, old);
        }
        atomic_fetch_sub(&word->sleepers, 1);
    }
    return begin ? nanoseconds() - begin : 0;
}

static void advance(signal_word *word) {
    atomic_fetch_add(&word->value, 1);
    if (atomic_load(&word->sleepers)) {
        wake_all(word);
    }
}

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
    }
}
