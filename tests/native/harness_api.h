// harness_api.h: what the tests call by name

#pragma once

#ifdef _WIN32
#    define HARNESS_API extern "C" __declspec(dllexport)
#else
#    define HARNESS_API extern "C" __attribute__((visibility("default")))
#endif
