// qcache-impl.h: what the files of the library share

#pragma once

#include "qcache.h"

#include <cstdarg>

#if defined(__GNUC__)
#    define QCACHE_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#    define QCACHE_PRINTF(a, b)
#endif

// records the text that qcache_last_error() gives and returns status, so that a failure is one statement
enum qcache_status qcache_fail(enum qcache_status status, const char * format, ...) QCACHE_PRINTF(2, 3);
