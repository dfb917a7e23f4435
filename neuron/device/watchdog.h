/* Watchdog: a thread that ends the process when a step of another thread takes too long.
 *
 * A kernel or a collective that never returns cannot be interrupted, and Python code that waits for it holds the GIL
 * or never takes it again: only a new process helps, and only a thread that needs no GIL can detect it. Arming and
 * disarming are one atomic store each. The watched thread owns everything but `deadline_ns`.
 */
#ifndef NEURON_DEVICE_WATCHDOG_H
#define NEURON_DEVICE_WATCHDOG_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

struct watchdog {
    _Atomic uint64_t deadline_ns; /* CLOCK_MONOTONIC; 0 = nothing to watch */
    uint64_t started_ns;          /* start of the current step */
    uint64_t limit_ns;            /* limit of a step, unless it sets its own */
    uint64_t period_ns;
    int exit_status;
    bool running, stop;
    pthread_t thread;
    pthread_mutex_t mutex; /* guards `stop` */
    pthread_cond_t wake;
    char name[16];
};

static inline uint64_t watchdog_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void watchdog_arm(struct watchdog *dog) {
    if (!dog->running)
        return;
    dog->started_ns = watchdog_now_ns();
    atomic_store_explicit(&dog->deadline_ns, dog->started_ns + dog->limit_ns, memory_order_relaxed);
}

static inline void watchdog_disarm(struct watchdog *dog) {
    if (dog->running)
        atomic_store_explicit(&dog->deadline_ns, 0, memory_order_relaxed);
}

/* Give the current step `limit_ns` from its start; 0 disables the watchdog for it. One store holds the whole deadline,
 * so that the thread never pairs the start of one step with the limit of another. */
static inline void watchdog_extend(struct watchdog *dog, uint64_t limit_ns) {
    if (dog->running)
        atomic_store_explicit(&dog->deadline_ns, limit_ns ? dog->started_ns + limit_ns : 0, memory_order_relaxed);
}

/* Start watching: a step over `limit_ns` ends the process with `exit_status`. Returns 0 or an errno. */
int watchdog_start(struct watchdog *dog, const char *name, uint64_t limit_ns, int exit_status);

/* End the thread and wait for it. Nothing happens if it does not run. */
void watchdog_stop(struct watchdog *dog);

#endif
