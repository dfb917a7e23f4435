/* Thread pool that runs one function on all threads, with barriers: N - 1 workers and the caller. */
#ifndef NEURON_POOL_H
#define NEURON_POOL_H

#include <stdint.h>

struct pool;

/* Return a pool of `num_threads` (the caller is one of them), or NULL when a thread cannot be created. */
struct pool *pool_create(int num_threads);

/* Stop and join the workers. No call may be running. */
void pool_destroy(struct pool *pool);

/* A monotonic clock's time in nanoseconds. */
int64_t now_ns(void);

int pool_threads(const struct pool *pool);

/* Call work(argument, thread) on every thread of the pool, 0 being the caller; return when all have returned. Calls from
 * several threads are serialised. */
void pool_run(struct pool *pool, void (*work)(void *argument, int thread), void *argument);

/* Within work: wait until every thread of the pool has arrived. Writes before are visible to all threads after. */
void pool_barrier(struct pool *pool);

#endif
