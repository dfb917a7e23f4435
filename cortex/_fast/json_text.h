/* The text of a Python str as the inside of a JSON string, in UTF-8.
 *
 * Written for the three widths in which CPython keeps text, so that no UTF-8 copy is made first and a lone surrogate
 * is no exception to raise and catch: it becomes U+FFFD, since UTF-8 has no form for it.
 */
#ifndef CORTEX_JSON_TEXT_H
#define CORTEX_JSON_TEXT_H

#include "scan.h"

/* The longest form of one character: a control character as \u00XX. */
#define JSON_ESCAPE_BYTES 6

/* Write the escape of a quote, a backslash or a control character; return where it ends. */
static inline uint8_t *json_put_escape(uint8_t *out, uint8_t c)
{
    static const char hex[] = "0123456789abcdef";
    *out++ = '\\';
    switch (c) {
    case '"':
    case '\\': *out++ = c; return out;
    case '\b': *out++ = 'b'; return out;
    case '\f': *out++ = 'f'; return out;
    case '\n': *out++ = 'n'; return out;
    case '\r': *out++ = 'r'; return out;
    case '\t': *out++ = 't'; return out;
    }
    memcpy(out, "u00", 3);
    out[3] = (uint8_t)hex[c >> 4];
    out[4] = (uint8_t)hex[c & 15];
    return out + 5;
}

/* Write one code point; return where it ends. At most JSON_ESCAPE_BYTES. */
static inline uint8_t *json_put_char(uint8_t *out, uint32_t c)
{
    if (c < 0x80) {
        if (c < 0x20 || c == '"' || c == '\\')
            return json_put_escape(out, (uint8_t)c);
        *out++ = (uint8_t)c;
        return out;
    }
    if (c < 0x800) {
        *out++ = (uint8_t)(0xC0 | c >> 6);
        *out++ = (uint8_t)(0x80 | (c & 0x3F));
        return out;
    }
    if (c >= 0xD800 && c <= 0xDFFF)
        c = 0xFFFD;
    if (c < 0x10000) {
        *out++ = (uint8_t)(0xE0 | c >> 12);
    } else {
        *out++ = (uint8_t)(0xF0 | c >> 18);
        *out++ = (uint8_t)(0x80 | (c >> 12 & 0x3F));
    }
    *out++ = (uint8_t)(0x80 | (c >> 6 & 0x3F));
    *out++ = (uint8_t)(0x80 | (c & 0x3F));
    return out;
}

/* Write `length` code points of `width` bytes each; return where they end. */
static inline uint8_t *json_put_wide(uint8_t *out, const void *text, int width, size_t length)
{
    size_t i;
    if (width == 1)
        for (i = 0; i < length; i++)
            out = json_put_char(out, ((const uint8_t *)text)[i]);
    else if (width == 2)
        for (i = 0; i < length; i++)
            out = json_put_char(out, ((const uint16_t *)text)[i]);
    else
        for (i = 0; i < length; i++)
            out = json_put_char(out, ((const uint32_t *)text)[i]);
    return out;
}

#endif
