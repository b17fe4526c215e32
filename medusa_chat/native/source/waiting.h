/* Numbers that threads wait on: they spin briefly and then sleep. Included by team.c alone. */
#ifndef MEDUSA_WAITING_H
#define MEDUSA_WAITING_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

enum { CACHE_LINE = 64, SPIN_NANOSECONDS = 30000, PAUSES_PER_CLOCK = 16 };

/* A number that threads wait on. */
typedef struct {
    _Alignas(CACHE_LINE) atomic_uint value;
    atomic_uint sleepers;
#if !defined(__linux__)
    pthread_mutex_t mutex;
    pthread_cond_t changed;
#endif
} signal_word;

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

#endif
