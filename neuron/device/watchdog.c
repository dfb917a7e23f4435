#define _GNU_SOURCE

#include "watchdog.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void *watch(void *argument) {
    struct watchdog *dog = argument;
    char line[128];
    pthread_setname_np(pthread_self(), "watchdog");
    pthread_mutex_lock(&dog->mutex);
    while (!dog->stop) {
        uint64_t until = watchdog_now_ns() + dog->period_ns;
        struct timespec wake = {.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};
        pthread_cond_timedwait(&dog->wake, &dog->mutex, &wake);
        uint64_t deadline = atomic_load_explicit(&dog->deadline_ns, memory_order_relaxed);
        if (dog->stop || deadline == 0 || watchdog_now_ns() <= deadline)
            continue;
        int length = snprintf(line, sizeof line, "%s: a step outlasted its limit, exiting with status %d\n", dog->name,
                              dog->exit_status);
        if (write(STDERR_FILENO, line, (size_t)length) < 0) {
            /* nowhere to report it: the exit status has to do */
        }
        _exit(dog->exit_status);
    }
    pthread_mutex_unlock(&dog->mutex);
    return NULL;
}

int watchdog_start(struct watchdog *dog, const char *name, uint64_t limit_ns, int exit_status) {
    pthread_condattr_t monotonic;
    sigset_t all, before;
    atomic_store_explicit(&dog->deadline_ns, 0, memory_order_relaxed);
    dog->limit_ns = limit_ns;
    /* at most a quarter of the limit late, and at most one wake-up a second when limits are long */
    dog->period_ns = limit_ns / 4 < 1000000000u ? limit_ns / 4 : 1000000000u;
    if (dog->period_ns < 1000000u)
        dog->period_ns = 1000000u;
    dog->exit_status = exit_status;
    dog->stop = false;
    snprintf(dog->name, sizeof dog->name, "%s", name);
    pthread_mutex_init(&dog->mutex, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&dog->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    /* signals stay with Python's threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&dog->thread, NULL, watch, dog);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        pthread_cond_destroy(&dog->wake);
        pthread_mutex_destroy(&dog->mutex);
        return error;
    }
    dog->running = true;
    return 0;
}

void watchdog_stop(struct watchdog *dog) {
    if (!dog->running)
        return;
    pthread_mutex_lock(&dog->mutex);
    dog->stop = true;
    pthread_cond_signal(&dog->wake);
    pthread_mutex_unlock(&dog->mutex);
    pthread_join(dog->thread, NULL);
    pthread_cond_destroy(&dog->wake);
    pthread_mutex_destroy(&dog->mutex);
    dog->running = false;
}
