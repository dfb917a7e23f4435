/* Byte searches that every module here is built on: runs of plain text, line ends, white space, keys.
 *
 * Text comes in long runs without a byte of interest, so each search tests 16 bytes at a time (SSE2, part of every
 * x86-64) or 8 (any other machine), and only the last few one by one. No search reads a byte outside [p, end).
 */
#ifndef CORTEX_SCAN_H
#define CORTEX_SCAN_H

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__) && !defined(CORTEX_PORTABLE_SCAN)
#include <emmintrin.h>
#define CORTEX_SSE2 1
#endif

#define SCAN_ONES 0x0101010101010101ull
#define SCAN_HIGHS 0x8080808080808080ull

static inline uint64_t scan_load(const uint8_t *p)
{
    uint64_t word;
    memcpy(&word, p, 8);
    return word;
}

/* Non-zero if a byte of `word` equals `byte`. Bytes above a true match may match falsely: only good as a filter. */
static inline uint64_t scan_has(uint64_t word, uint8_t byte)
{
    uint64_t x = word ^ (SCAN_ONES * byte);
    return (x - SCAN_ONES) & ~x & SCAN_HIGHS;
}

#ifdef CORTEX_SSE2
/* Return a bit for each of 16 bytes that is not plain ASCII inside a JSON string. */
static inline unsigned scan_plain_mask(const uint8_t *p)
{
    __m128i x = _mm_loadu_si128((const __m128i *)p);
    /* Signed: one comparison finds both the control characters and the bytes from 0x80 up. */
    __m128i outside = _mm_cmplt_epi8(x, _mm_set1_epi8(' '));
    __m128i quote = _mm_cmpeq_epi8(x, _mm_set1_epi8('"')), backslash = _mm_cmpeq_epi8(x, _mm_set1_epi8('\\'));
    return (unsigned)_mm_movemask_epi8(_mm_or_si128(outside, _mm_or_si128(quote, backslash)));
}
#endif

/* Return the first byte that ends a run of plain ASCII inside a JSON string: a quote, a backslash, a control
 * character or the start of a multi-byte character; `end` if there is none. */
static inline const uint8_t *scan_plain(const uint8_t *p, const uint8_t *end)
{
#ifdef CORTEX_SSE2
    for (; end - p >= 16; p += 16) {
        unsigned mask = scan_plain_mask(p);
        if (mask)
            return p + __builtin_ctz(mask);
    }
#else
    for (; end - p >= 8; p += 8) {
        uint64_t x = scan_load(p);
        if (scan_has(x, '"') | scan_has(x, '\\') | ((x - SCAN_ONES * 0x20) & SCAN_HIGHS) | (x & SCAN_HIGHS))
            break;
    }
#endif
    while (p < end && *p >= 0x20 && *p < 0x80 && *p != '"' && *p != '\\')
        p++;
    return p;
}

/* Return the first byte equal to `a` or `b`; `end` if there is none. */
static inline const uint8_t *scan_either(const uint8_t *p, const uint8_t *end, uint8_t a, uint8_t b)
{
#ifdef CORTEX_SSE2
    const __m128i left = _mm_set1_epi8((char)a), right = _mm_set1_epi8((char)b);
    for (; end - p >= 16; p += 16) {
        __m128i x = _mm_loadu_si128((const __m128i *)p);
        int mask = _mm_movemask_epi8(_mm_or_si128(_mm_cmpeq_epi8(x, left), _mm_cmpeq_epi8(x, right)));
        if (mask)
            return p + __builtin_ctz((unsigned)mask);
    }
#else
    for (; end - p >= 8; p += 8) {
        uint64_t x = scan_load(p);
        if (scan_has(x, a) | scan_has(x, b))
            break;
    }
#endif
    while (p < end && *p != a && *p != b)
        p++;
    return p;
}

/* Return what follows the white space that JSON allows between tokens. */
static inline const uint8_t *json_space(const uint8_t *p, const uint8_t *end)
{
    while (p < end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t'))
        p++;
    return p;
}

/* Return the first end of a line, LF or CR; `end` if there is none. */
static inline const uint8_t *scan_line_end(const uint8_t *p, const uint8_t *end)
{
    return scan_either(p, end, '\n', '\r');
}

/* Return the first `"usage"`, `end` if there is none.
 *
 * Filters on 'u' followed three bytes on by 'g': the needle's quotes stand at both ends of every five-letter key. */
static inline const uint8_t *scan_usage_key(const uint8_t *p, const uint8_t *end)
{
    static const char needle[] = "\"usage\"";
    enum { LENGTH = sizeof needle - 1 };
#ifdef CORTEX_SSE2
    const __m128i u = _mm_set1_epi8('u'), g = _mm_set1_epi8('g');
    for (; end - p >= 16 + LENGTH; p += 16) {
        __m128i second = _mm_loadu_si128((const __m128i *)(p + 1));
        __m128i fifth = _mm_loadu_si128((const __m128i *)(p + 4));
        unsigned mask = (unsigned)_mm_movemask_epi8(_mm_and_si128(_mm_cmpeq_epi8(second, u), _mm_cmpeq_epi8(fifth, g)));
        for (; mask; mask &= mask - 1) {
            const uint8_t *at = p + __builtin_ctz(mask);
            if (!memcmp(at, needle, LENGTH))
                return at;
        }
    }
#endif
    while (end - p >= LENGTH) {
        p = (const uint8_t *)memchr(p, '"', (size_t)(end - p) - LENGTH + 1);
        if (!p)
            return end;
        if (!memcmp(p, needle, LENGTH))
            return p;
        p++;
    }
    return end;
}

#endif
