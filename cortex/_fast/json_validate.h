/* Validates a JSON object in one pass, and records the places of a few of its members.
 *
 * Accepts what orjson accepts, so that a body that passes here is not refused by the process that decodes it: RFC 8259
 * with strict UTF-8, surrogate escapes in pairs, numbers within a double; but nesting to JSON_MAX_DEPTH only.
 * Iterative: one bit of memory for each open bracket, no recursion for a hostile body to exhaust. One file, so that the
 * compiler inlines the states into one loop.
 */
#ifndef CORTEX_JSON_VALIDATE_H
#define CORTEX_JSON_VALIDATE_H

#include <stddef.h>
#include "scan.h"

/* Below orjson's limits, which reads 1024 levels and writes 254: what is read here may be written again, within what
 * others put around it. */
#define JSON_MAX_DEPTH 200

/* Below this depth names are not looked up: no typed object of a dialect lies there. */
#define JSON_NAMED_DEPTH 12
#define JSON_MAX_NAME 47
#define JSON_MAX_UNKNOWN 16
#define JSON_MAX_REFUSED 128

/* A double holds every decimal below 1e308; from there on it must be read to be judged. */
#define JSON_SAFE_EXPONENT 308

enum json_kind { JSON_ABSENT, JSON_STRING, JSON_TRUE, JSON_FALSE, JSON_NULL, JSON_OTHER };

typedef struct {
    const char *name;
    size_t name_length;
    int kind;
    int escaped;                /* a string with escapes in it */
    const uint8_t *start, *end; /* the value, a string with its quotes */
} json_wanted;

typedef struct {
    const char *reason; /* NULL: accepted */
    const uint8_t *at;
    size_t limit; /* 0, or how many items or levels `reason` speaks of are taken */
    int is_depth;
} json_fault;

/* A member that an object may have, and the object (or array of such) that its value may be: a number of `json_known`'s
 * objects, 0 for one whose members are not checked. */
typedef struct {
    const char *name;
    uint16_t length, object;
    uint8_t is_refused;
} json_name;

/* The members of one object, those of length n at [by_length[n], by_length[n + 1]) of all names. */
typedef struct {
    uint16_t by_length[JSON_MAX_NAME + 2];
    uint8_t is_open;    /* any member may be there */
    uint32_t max_items; /* of an array in its place; 0: as many as there are */
} json_object;

typedef struct {
    const json_object *objects; /* the first is of no use, the second is the body itself; NULL: nothing is known */
    const json_name *names;
    size_t max_values, max_members; /* of the whole body, and of any object in it */
} json_known;

/* Result of a validation. Each unknown name is listed once, by its path, which end in a NUL and are ASCII that needs no
 * quoting anywhere. */
typedef struct {
    int num_unknown, is_cut;
    uint32_t hashes[JSON_MAX_UNKNOWN];
    int num_refused;
    const json_name *refused[JSON_MAX_REFUSED];
    size_t length;
    char paths[1024];
    char limited[256]; /* the path of what has too many items */
} json_found;

/* Says whether the number in [p, end) is finite as a double. Set by the caller: the answer needs its allocator. */
typedef int (*json_is_finite)(const uint8_t *p, const uint8_t *end);

static inline const uint8_t *json_fail(json_fault *fault, const char *reason, const uint8_t *at)
{
    fault->reason = reason;
    fault->at = at;
    fault->limit = 0;
    fault->is_depth = 0;
    return NULL;
}

static inline int json_hex4(const uint8_t *p)
{
    int value = 0;
    for (int i = 0; i < 4; i++) {
        uint8_t c = p[i];
        int digit = c >= '0' && c <= '9' ? c - '0' : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10 : -1;
        if (digit < 0)
            return -1;
        value = value << 4 | digit;
    }
    return value;
}

/* Return what follows the multi-byte character at `p`, or NULL if it is not valid UTF-8 (Unicode, table 3-7). */
static inline const uint8_t *json_utf8_char(const uint8_t *p, const uint8_t *end)
{
    uint8_t lead = *p;
    uint8_t low = 0x80, high = 0xBF;
    int more;
    if (lead >= 0xC2 && lead <= 0xDF) {
        more = 1;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
        more = 2;
        if (lead == 0xE0)
            low = 0xA0;
        else if (lead == 0xED)
            high = 0x9F;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
        more = 3;
        if (lead == 0xF0)
            low = 0x90;
        else if (lead == 0xF4)
            high = 0x8F;
    } else {
        return NULL;
    }
    if (end - p <= more || p[1] < low || p[1] > high)
        return NULL;
    for (int i = 2; i <= more; i++)
        if ((p[i] & 0xC0) != 0x80)
            return NULL;
    return p + 1 + more;
}

/* Return what follows a run of multi-byte characters, or NULL at the first that is invalid.
 *
 * The two lengths that nearly all text outside ASCII has are tested whole: a byte at a time, a Chinese body took three
 * times as long. */
static inline const uint8_t *json_utf8_run(const uint8_t *p, const uint8_t *end)
{
    while (p < end && *p >= 0x80) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        while (end - p >= 4) {
            uint32_t x;
            memcpy(&x, p, 4);
            /* Three bytes, the bits that tell an overlong form not all zero, and not those of a surrogate. */
            if ((x & 0x00C0C0F0) != 0x008080E0 || !(x & 0x0000200F) || (x & 0x0000200F) == 0x0000200D)
                break;
            p += 3;
        }
#endif
        while (end - p >= 3 && (p[0] & 0xF0) == 0xE0 && (p[1] & 0xC0) == 0x80 && (p[2] & 0xC0) == 0x80) {
            unsigned char_bits = (unsigned)(p[0] & 0x0F) << 6 | (unsigned)(p[1] & 0x3F);
            if (char_bits < 0x20 || (char_bits >= 0x360 && char_bits < 0x380)) /* overlong, surrogates */
                return NULL;
            p += 3;
        }
        while (end - p >= 2 && (p[0] & 0xE0) == 0xC0 && p[0] >= 0xC2 && (p[1] & 0xC0) == 0x80)
            p += 2;
        if (p == end || *p < 0x80)
            break;
        p = json_utf8_char(p, end);
        if (!p)
            return NULL;
    }
    return p;
}

/* What may follow a backslash, \u aside. */
static const uint8_t json_escapes[256] = {
    ['"'] = 1, ['\\'] = 1, ['/'] = 1, ['b'] = 1, ['f'] = 1, ['n'] = 1, ['r'] = 1, ['t'] = 1,
};

/* Return what follows the string whose opening quote is at `p`, or NULL with `fault` set. */
static inline const uint8_t *json_check_string(const uint8_t *p, const uint8_t *end, int *escaped, json_fault *fault)
{
    const uint8_t *const start = p;
    p++;
    for (;;) {
#ifdef CORTEX_SSE2
        /* Escapes are passed over within a block, without a new load behind each: where they are dense, as in code,
         * waiting for that load was three quarters of the time. */
        unsigned passed = 0;
        while (end - p >= 16) {
            unsigned mask = scan_plain_mask(p);
            if (!mask) {
                passed = 0;
                p += 16;
                continue;
            }
            mask = mask >> passed << passed;
            passed = 0;
            while (mask) {
                int at = __builtin_ctz(mask);
                const uint8_t *hit = p + at;
                if (*hit == '"')
                    return hit + 1;
                if (*hit != '\\' || hit + 1 == end || !json_escapes[hit[1]]) {
                    p = hit;
                    goto special;
                }
                *escaped = 1;
                mask &= ~(3u << at);
                passed = at == 15;
            }
            p += 16;
        }
        p += passed;
#endif
        p = scan_plain(p, end);
        if (p == end)
            return json_fail(fault, "a string does not end", start);
        if (*p == '\\' && end - p >= 2 && json_escapes[p[1]]) {
            *escaped = 1;
            p += 2;
            continue;
        }
#ifdef CORTEX_SSE2
    special:
#endif
        if (*p == '"')
            return p + 1;
        if (*p >= 0x80) {
            const uint8_t *next = json_utf8_run(p, end);
            if (!next)
                return json_fail(fault, "the text is not valid UTF-8", p);
            p = next;
            continue;
        }
        if (*p < 0x20)
            return json_fail(fault, "a control character is not escaped", p);
        *escaped = 1;
        if (end - p < 2)
            return json_fail(fault, "a string does not end", start);
        if (p[1] != 'u')
            return json_fail(fault, "an escape is not one of JSON's", p);
        int unit = end - p < 6 ? -1 : json_hex4(p + 2);
        if (unit < 0)
            return json_fail(fault, "\\u is not followed by four hexadecimal digits", p);
        if (unit >= 0xDC00 && unit <= 0xDFFF)
            return json_fail(fault, "half of a surrogate pair stands alone", p);
        if (unit >= 0xD800 && unit <= 0xDBFF) {
            int low = end - p < 12 || p[6] != '\\' || p[7] != 'u' ? -1 : json_hex4(p + 8);
            if (low < 0xDC00 || low > 0xDFFF)
                return json_fail(fault, "half of a surrogate pair stands alone", p);
            p += 6;
        }
        p += 6;
    }
}

static inline int json_is_digit(const uint8_t *p, const uint8_t *end)
{
    return p < end && *p >= '0' && *p <= '9';
}

/* Return what follows the number at `p`, or NULL with `fault` set. */
static inline const uint8_t *json_check_number(const uint8_t *p, const uint8_t *end, json_is_finite is_finite,
                                               json_fault *fault)
{
    const uint8_t *const start = p;
    const uint8_t *digits;
    long exponent = 0;
    if (*p == '-')
        p++;
    if (!json_is_digit(p, end))
        return json_fail(fault, "a number has no digits", start);
    digits = p++;
    if (*digits == '0') {
        if (json_is_digit(p, end))
            return json_fail(fault, "a number starts with a zero", start);
    } else {
        while (json_is_digit(p, end))
            p++;
    }
    size_t magnitude = (size_t)(p - digits); /* the value is below 10 to this power, times the exponent's */
    if (p < end && *p == '.') {
        p++;
        if (!json_is_digit(p, end))
            return json_fail(fault, "a number ends at its decimal point", start);
        while (json_is_digit(p, end))
            p++;
    }
    if (p < end && (*p | 0x20) == 'e') {
        int negative = 0;
        p++;
        if (p < end && (*p == '+' || *p == '-'))
            negative = *p++ == '-';
        if (!json_is_digit(p, end))
            return json_fail(fault, "a number ends at its exponent", start);
        for (; json_is_digit(p, end); p++)
            if (exponent <= JSON_SAFE_EXPONENT)
                exponent = exponent * 10 + (*p - '0');
        if (negative)
            exponent = 0; /* the magnitude alone is judged: a little too careful, and never wrong */
    }
    if (magnitude + (size_t)exponent > JSON_SAFE_EXPONENT && !is_finite(start, p))
        return json_fail(fault, "a number is too large", start);
    return p;
}

static inline const uint8_t *json_check_literal(const uint8_t *p, const uint8_t *end, const char *word, size_t length,
                                                json_fault *fault)
{
    if ((size_t)(end - p) < length || memcmp(p, word, length))
        return json_fail(fault, "expected a value", p);
    return p + length;
}

/* Write the text of the string body [p, end), valid and with escapes, to `out`; return its length, which is never
 * more than the body's. Stops before a character that would pass `room`. */
static inline size_t json_unescape(const uint8_t *p, const uint8_t *end, uint8_t *out, size_t room)
{
    uint8_t *const start = out;
    while (p < end && room - (size_t)(out - start) >= 4) {
        uint32_t c;
        if (*p != '\\') {
            *out++ = *p++;
            continue;
        }
        c = p[1];
        p += 2;
        switch (c) {
        case 'b': c = '\b'; break;
        case 'f': c = '\f'; break;
        case 'n': c = '\n'; break;
        case 'r': c = '\r'; break;
        case 't': c = '\t'; break;
        case 'u':
            c = (uint32_t)json_hex4(p);
            p += 4;
            if (c >= 0xD800 && c <= 0xDBFF) {
                c = 0x10000 + ((c - 0xD800) << 10) + ((uint32_t)json_hex4(p + 2) - 0xDC00);
                p += 6;
            }
            break;
        }
        if (c < 0x80) {
            *out++ = (uint8_t)c;
        } else if (c < 0x800) {
            *out++ = (uint8_t)(0xC0 | c >> 6);
            *out++ = (uint8_t)(0x80 | (c & 0x3F));
        } else if (c < 0x10000) {
            *out++ = (uint8_t)(0xE0 | c >> 12);
            *out++ = (uint8_t)(0x80 | (c >> 6 & 0x3F));
            *out++ = (uint8_t)(0x80 | (c & 0x3F));
        } else {
            *out++ = (uint8_t)(0xF0 | c >> 18);
            *out++ = (uint8_t)(0x80 | (c >> 12 & 0x3F));
            *out++ = (uint8_t)(0x80 | (c >> 6 & 0x3F));
            *out++ = (uint8_t)(0x80 | (c & 0x3F));
        }
    }
    return (size_t)(out - start);
}

/* Where a value is: the containers around it, as far down as names are looked up. */
typedef struct {
    const uint8_t *key[JSON_NAMED_DEPTH], *key_end[JSON_NAMED_DEPTH]; /* under which each was opened, or NULL */
    uint16_t object[JSON_NAMED_DEPTH];
} json_place;

static inline char *json_put(char *out, char *end, const uint8_t *text, size_t length)
{
    for (size_t i = 0; i < length && out < end; i++) {
        uint8_t c = text[i];
        int is_plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
        *out++ = is_plain ? (char)c : '?';
    }
    return out;
}

/* Write the path of the innermost of `depth` containers, or of a member of it, into [out, end) with a NUL; return its
 * length. `count` has how many members each container had so far. */
static inline size_t json_path(const json_place *place, const uint32_t *count, unsigned depth, const uint8_t *key,
                               const uint8_t *key_end, char *out, char *end)
{
    char *const start = out;
    end--;
    for (unsigned d = 1; d < depth && d < JSON_NAMED_DEPTH; d++) {
        if (place->key[d]) {
            if (out > start && out < end)
                *out++ = '.';
            size_t length = (size_t)(place->key_end[d] - place->key[d]);
            out = json_put(out, end, place->key[d], length < 48 ? length : 48);
        } else if (end - out > 12) {
            char digits[12];
            int n = 0;
            uint32_t index = count[d - 1];
            do
                digits[n++] = (char)('0' + index % 10);
            while (index /= 10);
            *out++ = '[';
            while (n)
                *out++ = digits[--n];
            *out++ = ']';
        }
    }
    if (key) {
        if (out > start && out < end)
            *out++ = '.';
        size_t length = (size_t)(key_end - key);
        out = json_put(out, end, key, length < 48 ? length : 48);
    }
    *out = 0;
    return (size_t)(out - start);
}

/* Return the member of an object that a key names, or NULL. */
static inline const json_name *json_known_name(const json_known *known, const json_object *object, const uint8_t *key,
                                               size_t length)
{
    if (length > JSON_MAX_NAME)
        return NULL;
    for (unsigned i = object->by_length[length]; i < object->by_length[length + 1]; i++)
        if (!memcmp(known->names[i].name, key, length))
            return &known->names[i];
    return NULL;
}

/* List an unknown member, once. Not inlined: bodies have none. */
static __attribute__((noinline)) void json_tell(json_found *found, const json_place *place, const uint32_t *count,
                                                unsigned depth, unsigned object, const uint8_t *key,
                                                const uint8_t *key_end)
{
    uint32_t hash = 2166136261u ^ object;
    size_t length = (size_t)(key_end - key);
    if (found->num_unknown == JSON_MAX_UNKNOWN || sizeof found->paths - found->length < 2) {
        found->is_cut = 1;
        return;
    }
    for (size_t i = 0; i < length && i < 64; i++)
        hash = (hash ^ key[i]) * 16777619u;
    for (int i = 0; i < found->num_unknown; i++)
        if (found->hashes[i] == hash)
            return;
    found->hashes[found->num_unknown++] = hash;
    found->length += 1 + json_path(place, count, depth, key, key_end, found->paths + found->length,
                                   found->paths + sizeof found->paths);
}

/* Note a member that may be refused, once. */
static __attribute__((noinline)) void json_refuse(json_found *found, const json_name *name)
{
    for (int i = 0; i < found->num_refused; i++)
        if (found->refused[i] == name)
            return;
    if (found->num_refused < JSON_MAX_REFUSED)
        found->refused[found->num_refused++] = name;
}

/* Return which wanted member a key names, or NULL. */
static inline json_wanted *json_match_key(const uint8_t *key, size_t length, json_wanted *wanted, int num_wanted)
{
    for (int i = 0; i < num_wanted; i++)
        if (wanted[i].name_length == length && !memcmp(wanted[i].name, key, length))
            return &wanted[i];
    return NULL;
}

/* Check the document [start, end), fill `wanted` from its top-level members, of which the last counts where a key is
 * given twice, and `found` with what `known` says of its names and sizes. */
static inline json_fault json_check_object(const uint8_t *start, const uint8_t *end, json_is_finite is_finite,
                                           json_wanted *wanted, int num_wanted, const json_known *known,
                                           json_found *found)
{
    uint64_t is_object[(JSON_MAX_DEPTH + 63) / 64] = {0};
    unsigned depth = 0;
    const uint8_t *p = json_space(start, end);
    const uint8_t *value;
    json_wanted *member = NULL;
    json_fault fault = {NULL, NULL, 0, 0};
    int kind, escaped, in_object;
    uint32_t count[JSON_MAX_DEPTH]; /* of the members that each open container had before the one at hand */
    size_t num_values = 0;
    json_place place;
    unsigned object = 1; /* that the value at hand may be */

    place.object[0] = 0;
    if (p == end) {
        json_fail(&fault, "the body is empty", p);
        return fault;
    }
    if (*p != '{') {
        json_fail(&fault, "the body is not a JSON object", p);
        return fault;
    }

value:
    value = p = json_space(p, end);
    if (p == end) {
        json_fail(&fault, "the body ends early", p);
        return fault;
    }
    escaped = 0;
    if (++num_values > known->max_values) {
        json_fail(&fault, "the body has too many values", p);
        fault.limit = known->max_values;
        found->limited[0] = 0;
        return fault;
    }
    switch (*p) {
    case '{':
    case '[':
        if (depth == JSON_MAX_DEPTH) {
            json_fail(&fault, "the nesting is too deep", p);
            fault.limit = JSON_MAX_DEPTH;
            fault.is_depth = 1;
            json_path(&place, count, depth, NULL, NULL, found->limited, found->limited + sizeof found->limited);
            return fault;
        }
        in_object = *p == '{';
        count[depth] = 0;
        if (depth < JSON_NAMED_DEPTH)
            place.object[depth] = (uint16_t)object;
        if (in_object)
            is_object[depth / 64] |= 1ull << depth % 64;
        else
            is_object[depth / 64] &= ~(1ull << depth % 64);
        if (depth == 1 && member) {
            member->kind = JSON_OTHER;
            member->start = p;
        }
        depth++;
        p = json_space(p + 1, end);
        if (p < end && *p == (in_object ? '}' : ']'))
            goto close;
        if (in_object)
            goto key;
        if (depth < JSON_NAMED_DEPTH)
            place.key[depth] = NULL;
        goto value;
    case '"':
        kind = JSON_STRING;
        p = json_check_string(p, end, &escaped, &fault);
        break;
    case 't':
        kind = JSON_TRUE;
        p = json_check_literal(p, end, "true", 4, &fault);
        break;
    case 'f':
        kind = JSON_FALSE;
        p = json_check_literal(p, end, "false", 5, &fault);
        break;
    case 'n':
        kind = JSON_NULL;
        p = json_check_literal(p, end, "null", 4, &fault);
        break;
    case '-': case '0': case '1': case '2': case '3': case '4': case '5': case '6': case '7': case '8': case '9':
        kind = JSON_OTHER;
        p = json_check_number(p, end, is_finite, &fault);
        break;
    default:
        p = json_fail(&fault, "expected a value", p);
    }
    if (!p)
        return fault;
    if (depth == 1 && member) {
        member->kind = kind;
        member->escaped = escaped;
        member->start = value;
        member->end = p;
    }

after_value:
    p = json_space(p, end);
    in_object = is_object[(depth - 1) / 64] >> (depth - 1) % 64 & 1;
    if (p == end) {
        json_fail(&fault, "the body ends early", p);
        return fault;
    }
    if (*p == ',') {
        uint32_t most = (uint32_t)known->max_members;
        object = depth <= JSON_NAMED_DEPTH ? place.object[depth - 1] : 0;
        if (!in_object)
            most = object ? known->objects[object].max_items : 0;
        if (++count[depth - 1] >= most && most) {
            json_fail(&fault, in_object ? "an object has too many members" : "a list has too many items", p);
            fault.limit = most;
            json_path(&place, count, depth, NULL, NULL, found->limited, found->limited + sizeof found->limited);
            return fault;
        }
        p = json_space(p + 1, end);
        if (in_object)
            goto key;
        goto value;
    }
    if (*p != (in_object ? '}' : ']')) {
        json_fail(&fault, in_object ? "expected , or }" : "expected , or ]", p);
        return fault;
    }

close:
    p++;
    if (--depth) {
        if (depth == 1 && member)
            member->end = p;
        goto after_value;
    }
    p = json_space(p, end);
    if (p != end)
        json_fail(&fault, "something follows the JSON object", p);
    return fault;

key:
    if (p == end || *p != '"') {
        json_fail(&fault, p == end ? "the body ends early" : "expected a key", p);
        return fault;
    }
    value = p;
    escaped = 0;
    p = json_check_string(p, end, &escaped, &fault);
    if (!p)
        return fault;
    object = depth <= JSON_NAMED_DEPTH ? place.object[depth - 1] : 0;
    if (depth == 1 || object) {
        uint8_t plain[64];
        const uint8_t *key = value + 1;
        size_t length = (size_t)(p - 1 - key);
        if (escaped) {
            length = json_unescape(key, p - 1, plain, sizeof plain);
            key = plain;
        }
        if (depth == 1)
            member = json_match_key(key, length, wanted, num_wanted);
        if (depth < JSON_NAMED_DEPTH) {
            place.key[depth] = value + 1;
            place.key_end[depth] = p - 1;
        }
        if (object) {
            const json_name *name = json_known_name(known, &known->objects[object], key, length);
            if (!name && !known->objects[object].is_open)
                json_tell(found, &place, count, depth, object, value + 1, p - 1);
            if (name && name->is_refused)
                json_refuse(found, name);
            object = name ? name->object : 0;
        }
    } else if (depth < JSON_NAMED_DEPTH) {
        place.key[depth] = value + 1;
        place.key_end[depth] = p - 1;
    }
    p = json_space(p, end);
    if (p == end || *p != ':') {
        json_fail(&fault, "expected : after a key", p);
        return fault;
    }
    p++;
    goto value;
}

#endif
