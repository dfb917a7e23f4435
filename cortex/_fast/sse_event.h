/* Where an SSE event ends, and where its lines do. Shared by the decoder and the usage scanner. */
#ifndef CORTEX_SSE_EVENT_H
#define CORTEX_SSE_EVENT_H

#include <stddef.h>
#include "scan.h"

/* Return the length of the SSE event at the start of `p`, its blank line included, or 0 while it is unfinished.
 *
 * `*resume` is 0 for a new SSE event. An unfinished SSE event leaves in it how far this call got, and the next call,
 * with more bytes behind the same ones, goes on from there: bytes are scanned once however they are cut. A CR as the
 * last byte may be half of a CRLF: with `eager` it counts as a whole line end (the caller then drops an LF that
 * follows), otherwise the SSE event waits for the next byte. */
static inline size_t sse_event_length(const uint8_t *p, size_t length, size_t *resume, int eager)
{
    const uint8_t *const end = p + length;
    const uint8_t *at = p + *resume;
    if (at == p && length && (*p == '\n' || *p == '\r')) {
        if (*p == '\n')
            return 1;
        if (length > 1)
            return p[1] == '\n' ? 2 : 1;
        return eager ? 1 : 0;
    }
    for (;;) {
        const uint8_t *line_end = scan_line_end(at, end);
        const uint8_t *next = line_end + 1;
        if (line_end == end) {
            *resume = length;
            return 0;
        }
        if (*line_end == '\r' && next < end && *next == '\n')
            next++;
        if (next < end && *next == '\n')
            return (size_t)(next + 1 - p);
        if (next < end && *next == '\r') {
            if (next + 1 < end)
                return (size_t)(next + 1 + (next[1] == '\n') - p);
            if (eager)
                return length;
        }
        if (end - next <= 1 && (next == end || *next == '\r')) {
            *resume = (size_t)(line_end - p);
            return 0;
        }
        at = next;
    }
}

/* Return the start of the line after the one that ends at `line_end`. */
static inline const uint8_t *sse_next_line(const uint8_t *line_end, const uint8_t *end)
{
    if (line_end == end)
        return end;
    if (*line_end == '\r' && end - line_end > 1 && line_end[1] == '\n')
        return line_end + 2;
    return line_end + 1;
}

/* Return the value of a line if its field is `name`, else NULL: what follows the colon and one optional space. */
static inline const uint8_t *sse_field(const uint8_t *line, const uint8_t *line_end, const char *name, size_t length)
{
    if ((size_t)(line_end - line) < length || memcmp(line, name, length))
        return NULL;
    line += length;
    if (line == line_end)
        return line;
    if (*line != ':')
        return NULL;
    line++;
    return line < line_end && *line == ' ' ? line + 1 : line;
}

#endif
