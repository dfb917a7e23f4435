/* Definitions shared by the bench's two programs: the marker in a request, the stamp in an SSE event, and a clock.
 *
 * A gateway rewrites a body as it likes but passes a message's text on. So what is asked for stands in the text itself,
 * as `#IIIIIIIIFFFFPPPP` in hexadecimal: a number that no other request has, how many SSE events to answer with (0: an
 * answer that is not streamed), and the pause between two SSE events in units of 0.1 ms (0: as fast as they are taken).
 * An answer that is not streamed repeats the marker, so that it is seen whose it is. The text of SSE event number N of
 * a stream is `#NNNNTTTTTTTTTTTTTTTT`, where T is when it was sent, in nanoseconds of the clock that all processes of a
 * machine share. There is no other `#` in any body.
 */
#ifndef BENCH_SHARED_H
#define BENCH_SHARED_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { ID_DIGITS = 8, EVENTS_DIGITS = 4, PACE_DIGITS = 4, MARKER_BYTES = 1 + ID_DIGITS + EVENTS_DIGITS + PACE_DIGITS };
enum { NUMBER_DIGITS = 4, TIME_DIGITS = 16, STAMP_BYTES = 1 + NUMBER_DIGITS + TIME_DIGITS };

#define PACE_UNIT_NS 100000u
#define MAX_SSE_EVENTS 0xffffu

/* The text of an answer that is not streamed, after its marker. */
#define ANSWER_WORDS                                                                                                   \
    " word word word word word word word word word word word word word word word word word word word word word word"  \
    " word word word word word word word word word word word word word word word word word word word word word word"

static inline uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static inline void put_hex(char *to, uint64_t value, int num_digits)
{
    for (int i = num_digits - 1; i >= 0; i--, value >>= 4)
        to[i] = "0123456789abcdef"[value & 15];
}

/* Read num_digits lower-case hexadecimal digits; return 0 if one of them is none. */
static inline int get_hex(const char *from, int num_digits, uint64_t *value)
{
    *value = 0;
    for (int i = 0; i < num_digits; i++) {
        unsigned digit = (unsigned)(from[i] - '0');
        if (digit > 9) {
            digit = (unsigned)(from[i] - 'a') + 10;
            if (digit < 10 || digit > 15)
                return 0;
        }
        *value = *value << 4 | digit;
    }
    return 1;
}

static inline _Noreturn void die(const char *what)
{
    perror(what);
    exit(2);
}

#endif
