# embed.cmake: qcache.metal, one text without an include of ours, and a C++ file that holds it
#
# cmake -DOUT=FOLDER -P embed.cmake
#
# A file comes after those that it includes.

set(gpu "${CMAKE_CURRENT_LIST_DIR}/../gpu")
set(metal "${CMAKE_CURRENT_LIST_DIR}")
set(QCACHE_METAL_FILES ${gpu}/attn-args.h ${gpu}/simt.h ${gpu}/kv.h ${gpu}/append.h ${gpu}/attn-decode.h ${gpu}/v-skip.h
    ${metal}/prefill-shape.h ${metal}/thread.metal ${metal}/attn-prefill.metal ${metal}/entry.metal)

if(NOT CMAKE_SCRIPT_MODE_FILE)
    return() # included for the list
endif()
cmake_minimum_required(VERSION 3.21)

set(text "// The Metal kernels of ggml-qcache: files of ggml_qcache/gpu and ggml_qcache/metal, one after another.\n\n")
set(before)
foreach(file IN LISTS QCACHE_METAL_FILES)
    get_filename_component(name "${file}" NAME)
    file(READ "${file}" content)
    string(REGEX MATCHALL "#include \"[^\"]*\"" includes "${content}")
    foreach(include IN LISTS includes)
        string(REGEX REPLACE ".*[\"/]([^\"/]+)\"$" "\\1" included "${include}")
        if(NOT included IN_LIST before)
            message(FATAL_ERROR "${name} has ${include}, which does not come before it in embed.cmake")
        endif()
    endforeach()
    string(REGEX REPLACE "#include \"[^\"]*\"\n" "" content "${content}")
    string(REGEX REPLACE "#pragma once\n+" "" content "${content}")
    string(APPEND text "${content}\n")
    list(APPEND before "${name}")
endforeach()
file(WRITE "${OUT}/qcache.metal" "${text}")

# an array of numbers: compilers limit the length of a string literal
file(READ "${OUT}/qcache.metal" bytes HEX)
string(LENGTH "${bytes}" size)
math(EXPR size "${size} / 2")
string(REGEX REPLACE "(................................)" "\\1\n" bytes "${bytes}")
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${bytes}")
file(WRITE "${OUT}/qcache-metal-source.cpp" "#include <cstddef>

extern const char   qcache_metal_source[];
extern const size_t qcache_metal_source_size;

const char   qcache_metal_source[]    = {\n${bytes} 0 };
const size_t qcache_metal_source_size = ${size};
")
