# sources.cmake: the kernel files and the instruction set each is compiled for. Which one runs is found at run time.

include(CheckCXXCompilerFlag)

list(APPEND QCACHE_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/attn-dispatch.cpp
    ${CMAKE_CURRENT_LIST_DIR}/attn-scalar.cpp
    ${CMAKE_CURRENT_LIST_DIR}/matmul-dispatch.cpp
    ${CMAKE_CURRENT_LIST_DIR}/matmul-pack.cpp)

if (CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    list(APPEND QCACHE_SOURCES
        ${CMAKE_CURRENT_LIST_DIR}/attn-avx2.cpp
        ${CMAKE_CURRENT_LIST_DIR}/attn-avx512.cpp
        ${CMAKE_CURRENT_LIST_DIR}/matmul-avx2.cpp
        ${CMAKE_CURRENT_LIST_DIR}/matmul-avx512.cpp
        ${CMAKE_CURRENT_LIST_DIR}/quantize-avx2.cpp
        ${CMAKE_CURRENT_LIST_DIR}/quantize-avx512.cpp)
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/attn-avx2.cpp ${CMAKE_CURRENT_LIST_DIR}/matmul-avx2.cpp PROPERTIES
        COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
    check_cxx_compiler_flag(-mavxvnni QCACHE_COMPILES_AVX_VNNI) # GCC 11, Clang 12
    if (QCACHE_COMPILES_AVX_VNNI)
        list(APPEND QCACHE_SOURCES ${CMAKE_CURRENT_LIST_DIR}/matmul-avxvnni.cpp)
        set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/matmul-avxvnni.cpp PROPERTIES
            COMPILE_OPTIONS "-mavxvnni;-mavx2;-mfma;-mf16c")
        set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/matmul-dispatch.cpp PROPERTIES
            COMPILE_DEFINITIONS QCACHE_HAS_AVX_VNNI)
    endif()
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/attn-avx512.cpp PROPERTIES
        COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c")
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/matmul-avx512.cpp PROPERTIES
        COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-mavx2;-mfma;-mf16c")
    # as ggml-base is compiled, whose bits they give: nothing fused
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/quantize-avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mf16c;-ffp-contract=off")
    set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/quantize-avx512.cpp PROPERTIES
        COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mf16c;-ffp-contract=off")
elseif (CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
    list(APPEND QCACHE_SOURCES ${CMAKE_CURRENT_LIST_DIR}/attn-neon.cpp)
endif()
