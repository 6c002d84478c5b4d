// ptx_impl.h: a kernel as it is decoded once and run many times

#pragma once

#include "ptx.h"

#include <vector>

namespace ptx {

class machine;
struct instruction;

using handler = void (*)(machine & m, const instruction & i, uint32_t lanes);

enum class kind {
    plain, // each lane for itself
    warp,  // takes all lanes of a warp
    barrier,
    branch,
    exit,
};

// Operands are places in a warp's registers, where immediates, special registers and addresses have theirs too.
struct instruction {
    handler  run       = nullptr;
    kind     what      = kind::plain;
    int      guard     = -1; // place of the predicate; -1: none
    bool     guard_not = false;
    bool     wide      = false; // the address is of 64 bits
    bool     widens    = false; // what is loaded goes into registers of 64 bits
    uint8_t  n_d = 0, n_s = 0;
    int      d[4], s[12]; // check_operands() in ptx_decode.cpp counts them
    int64_t  offset = 0; // of an address
    int      target = 0; // of a branch, in the code
    int      line   = 0; // in the function's text
};

struct constant {
    int      place;
    bool     wide;
    uint64_t value;
};

enum special { TID_X, LANE, CTAID_X, CTAID_Y, CTAID_Z, NTID_X, NCTAID_X, NCTAID_Y, NCTAID_Z, N_SPECIAL };

struct function {
    std::string              name;
    std::vector<std::string> text; // its statements
    std::vector<instruction> code;
    std::vector<size_t>      parameter_offsets, parameter_sizes;
    size_t                   parameter_bytes = 0;
    std::vector<constant>    constants;
    std::vector<constant>    of_parameters; // places with addresses of parameters; value: offset among them
    int                      specials[N_SPECIAL];
    size_t                   register_bytes = 0; // of a warp
    size_t                   static_shared = 0, local_bytes = 0;
    int                      max_threads = 1024;
};

// Throws std::runtime_error: it is not known.
handler handler_for(const std::string & opcode, kind & what);

} // namespace ptx
