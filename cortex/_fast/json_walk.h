/* Walks the members of a JSON object without building it, for SSE events that another process made.
 *
 * Trusts nothing and validates little: whatever the bytes are, no step leaves [p, end), and a walk over something that
 * is not JSON stops with NULL. For validation see json_validate.h.
 */
#ifndef CORTEX_JSON_WALK_H
#define CORTEX_JSON_WALK_H

#include <stddef.h>
#include "scan.h"

typedef struct {
    const uint8_t *key, *key_end;     /* between the quotes, escapes as written */
    const uint8_t *value, *value_end; /* a string with its quotes */
} json_member;

/* Return what follows the string whose opening quote is at `p`, or NULL if it does not end. */
static inline const uint8_t *json_skip_string(const uint8_t *p, const uint8_t *end)
{
    for (p++; (p = scan_either(p, end, '"', '\\')) != end; p += 2) {
        if (*p == '"')
            return p + 1;
        if (end - p < 2)
            return NULL;
    }
    return NULL;
}

/* Return what follows the value at `p`, or NULL if it does not end. A number or a literal ends where it stops. */
static inline const uint8_t *json_skip_value(const uint8_t *p, const uint8_t *end)
{
    size_t depth = 0;
    if (p == end)
        return NULL;
    if (*p == '"')
        return json_skip_string(p, end);
    if (*p != '{' && *p != '[') {
        const uint8_t *start = p;
        while (p < end && *p != ',' && *p != '}' && *p != ']' && *p != ' ' && *p != '\n' && *p != '\r' && *p != '\t')
            p++;
        return p == start ? NULL : p;
    }
    while (p < end) {
        if (*p == '"') {
            p = json_skip_string(p, end);
            if (!p)
                return NULL;
            continue;
        }
        if (*p == '{' || *p == '[')
            depth++;
        else if ((*p == '}' || *p == ']') && --depth == 0)
            return p + 1;
        p++;
    }
    return NULL;
}

/* Return what follows the opening bracket of the object or array at `p`, or NULL if there is none. */
static inline const uint8_t *json_open(const uint8_t *p, const uint8_t *end, uint8_t bracket)
{
    return p && p < end && *p == bracket ? p + 1 : NULL;
}

/* Read the member of an object at `p`; return where the next one is, or NULL when there is none. `p` may be NULL. */
static inline const uint8_t *json_next_member(const uint8_t *p, const uint8_t *end, json_member *member)
{
    if (!p)
        return NULL;
    p = json_space(p, end);
    if (p < end && *p == ',')
        p = json_space(p + 1, end);
    if (p == end || *p != '"')
        return NULL;
    member->key = p + 1;
    p = json_skip_string(p, end);
    if (!p)
        return NULL;
    member->key_end = p - 1;
    p = json_space(p, end);
    if (p == end || *p != ':')
        return NULL;
    member->value = json_space(p + 1, end);
    return member->value_end = json_skip_value(member->value, end);
}

/* Read the element of an array at `p`; return where the next one is, or NULL when there is none. `p` may be NULL. */
static inline const uint8_t *json_next_element(const uint8_t *p, const uint8_t *end, const uint8_t **element)
{
    if (!p)
        return NULL;
    p = json_space(p, end);
    if (p < end && *p == ',')
        p = json_space(p + 1, end);
    *element = p;
    return json_skip_value(p, end);
}

static inline int json_key_is(const json_member *member, const char *name)
{
    size_t length = strlen(name);
    return (size_t)(member->key_end - member->key) == length && !memcmp(member->key, name, length);
}

#endif
