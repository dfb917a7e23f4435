/* The pool of pool.h. A step has some 150 barriers a few microseconds apart, so a waiting thread spins; after SPIN_NS
 * it sleeps on a futex and so yields its core, and workers wait in this way between steps.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SPIN_NS = 50000, SPINS_PER_LOOK = 64 };

/* A counter that threads wait on. Padded: each has a cache line pair of its own. */
struct event {
    _Alignas(128) _Atomic uint32_t value;
    _Atomic uint32_t num_sleepers;
};

struct worker {
    struct pool *pool;
    pthread_t thread;
    int number;
};

struct pool {
    struct event start;   /* counts calls */
    struct event barrier; /* counts barriers passed */
    _Alignas(128) _Atomic uint32_t num_arrived;
    _Alignas(128) int num_threads;
    _Atomic int stopping;
    void (*work)(void *, int);
    void *argument;
    pthread_mutex_t call_lock;
    struct worker *workers;
};

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void wait_beyond(struct event *event, uint32_t seen) {
    int64_t deadline = 0;
    for (int spins = 0; atomic_load_explicit(&event->value, memory_order_acquire) == seen; spins++) {
        relax();
        if (spins % SPINS_PER_LOOK != SPINS_PER_LOOK - 1) continue;
        int64_t now = now_ns();
        if (deadline == 0) deadline = now + SPIN_NS;
        if (now < deadline) continue;
        /* Sequentially consistent with advance(): either it finds the sleeper, or the sleeper reads the new value. */
        atomic_fetch_add(&event->num_sleepers, 1);
        while (atomic_load(&event->value) == seen)
            syscall(SYS_futex, &event->value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        atomic_fetch_sub(&event->num_sleepers, 1);
        return;
    }
}

static void advance(struct event *event) {
    atomic_fetch_add(&event->value, 1);
    if (atomic_load(&event->num_sleepers) != 0)
        syscall(SYS_futex, &event->value, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

void pool_barrier(struct pool *pool) {
    if (pool->num_threads == 1) return;
    uint32_t seen = atomic_load_explicit(&pool->barrier.value, memory_order_acquire);
    if (atomic_fetch_add(&pool->num_arrived, 1) + 1 == (uint32_t)pool->num_threads) {
        /* No thread arrives at the next barrier before this one has passed. */
        atomic_store_explicit(&pool->num_arrived, 0, memory_order_relaxed);
        advance(&pool->barrier);
    } else {
        wait_beyond(&pool->barrier, seen);
    }
}

static void *serve(void *argument) {
    struct worker *worker = argument;
    struct pool *pool = worker->pool;
    for (uint32_t seen = 0;; seen++) {
        wait_beyond(&pool->start, seen);
        if (atomic_load(&pool->stopping)) return NULL;
        pool->work(pool->argument, worker->number);
        pool_barrier(pool);
    }
}

void pool_run(struct pool *pool, void (*work)(void *, int), void *argument) {
    pthread_mutex_lock(&pool->call_lock);
    pool->work = work;
    pool->argument = argument;
    if (pool->num_threads > 1) advance(&pool->start);
    work(argument, 0);
    pool_barrier(pool);
    pthread_mutex_unlock(&pool->call_lock);
}

int pool_threads(const struct pool *pool) { return pool->num_threads; }

struct pool *pool_create(int num_threads) {
    struct pool *pool = NULL;
    if (posix_memalign((void **)&pool, 128, sizeof *pool) != 0) return NULL;
    *pool = (struct pool){.num_threads = 1};
    pthread_mutex_init(&pool->call_lock, NULL);
    pool->workers = calloc((size_t)num_threads, sizeof *pool->workers);
    if (pool->workers == NULL) {
        pool_destroy(pool);
        return NULL;
    }
    /* The main thread handles signals. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int started = 1;
    for (; started < num_threads; started++) {
        struct worker *worker = &pool->workers[started];
        *worker = (struct worker){.pool = pool, .number = started};
        if (pthread_create(&worker->thread, NULL, serve, worker) != 0) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    /* Workers read it after the first start only. */
    pool->num_threads = started;
    if (started < num_threads) {
        pool_destroy(pool);
        return NULL;
    }
    return pool;
}

void pool_destroy(struct pool *pool) {
    atomic_store(&pool->stopping, 1);
    advance(&pool->start);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_mutex_destroy(&pool->call_lock);
    free(pool->workers);
    free(pool);
}
