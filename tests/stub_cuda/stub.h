/* Definitions shared by the stubs: symbol visibility, and the log STUB_CUDA_LOG, a line for each call of interest. */
#pragma once
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define API __attribute__((visibility("default")))

static void log_call(const char *format, ...) {
    static FILE *file;
    static int opened;
    if (!opened) {
        const char *path = getenv("STUB_CUDA_LOG");
        opened = 1;
        file = path ? fopen(path, "a") : NULL;
    }
    if (!file)
        return;
    va_list arguments;
    va_start(arguments, format);
    vfprintf(file, format, arguments);
    va_end(arguments);
    fputc('\n', file);
    fflush(file);
}
