// check.h: counts checks; a failed one prints where and why, and the program exits with 1

#pragma once

#include <cstdio>

static int n_checks = 0;
static int n_failed = 0;

#define CHECK(condition)                                                                 \
    do {                                                                                 \
        n_checks++;                                                                      \
        if (!(condition)) {                                                              \
            n_failed++;                                                                  \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);      \
        }                                                                                \
    } while (0)

static int check_report(const char * name) {
    printf("%s: %d checks, %d failed\n", name, n_checks, n_failed);
    return n_failed == 0 ? 0 : 1;
}
