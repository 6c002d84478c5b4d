// qcache-status.cpp: code names, the thread's last error, versions

#include "qcache-impl.h"

#include <cstdio>
#include <cstring>

static thread_local char last_error[2048];

enum qcache_status qcache_fail(enum qcache_status status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof(last_error), format, args);
    va_end(args);
    return status;
}

const char * qcache_last_error(void) {
    return last_error;
}

const char * qcache_status_name(enum qcache_status status) {
    switch (status) {
        case QCACHE_STATUS_SUCCESS:          return "SUCCESS";
        case QCACHE_STATUS_NO_BLOCKS:        return "NO_BLOCKS";
        case QCACHE_STATUS_CONTEXT_FULL:     return "CONTEXT_FULL";
        case QCACHE_STATUS_INVALID_ARGUMENT: return "INVALID_ARGUMENT";
        case QCACHE_STATUS_FILE:             return "FILE";
        case QCACHE_STATUS_INVALID_MODEL:    return "INVALID_MODEL";
        case QCACHE_STATUS_UNSUPPORTED:      return "UNSUPPORTED";
        case QCACHE_STATUS_OUT_OF_MEMORY:    return "OUT_OF_MEMORY";
        case QCACHE_STATUS_INVALID_STATE:    return "INVALID_STATE";
        case QCACHE_STATUS_VERSION:          return "VERSION";
        case QCACHE_STATUS_INTERNAL:         return "INTERNAL";
    }
    return "UNKNOWN";
}

const char * qcache_version(void) {
    return QCACHE_VERSION;
}

enum qcache_status qcache_check_ggml_version(const char * ggml_version) {
    if (ggml_version == nullptr || strcmp(ggml_version, QCACHE_GGML_VERSION) != 0) {
        return qcache_fail(QCACHE_STATUS_VERSION,
                           "built for ggml %s, but ggml %s is loaded: reinstall ggml-qcache against the installed llama-cpp-python",
                           QCACHE_GGML_VERSION, ggml_version ? ggml_version : "(null)");
    }
    return QCACHE_STATUS_SUCCESS;
}
