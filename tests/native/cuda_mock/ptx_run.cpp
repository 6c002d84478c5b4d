// ptx_run.cpp: the instructions, and the machine that goes through them

#include "../memory_races.h"
#include "ptx_impl.h"

#include <ggml.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <type_traits>

namespace ptx {

namespace {

constexpr uint32_t ALL = ~0u;

struct f16 {
    uint16_t bits;
};

struct predicate {
    uint32_t holds;
};

} // namespace

class machine {
  public:
    machine(const function & f, const geometry & g, const void * const * given, const device_memory & memory)
        : f(f), g(g), memory(memory), shared(f.static_shared + g.shared_bytes), races((int) shared.size() + 2), args(f.parameter_bytes + 16),
          warps(g.n_threads / 32) {
        for (size_t i = 0; i < f.parameter_sizes.size(); i++) {
            memcpy(args.data() + f.parameter_offsets[i], given[i], f.parameter_sizes[i]);
        }
        for (warp & w : warps) {
            w.registers.resize(f.register_bytes);
            w.local.resize(32 * f.local_bytes);
        }
    }

    counts run() {
        int at[3];
        for (at[2] = 0; at[2] < g.grid[2]; at[2]++) {
            for (at[1] = 0; at[1] < g.grid[1]; at[1]++) {
                for (at[0] = 0; at[0] < g.grid[0]; at[0]++) {
                    run_block(at);
                }
            }
        }
        return n;
    }

    template <class T> T get(int place, int lane) const {
        T value;
        memcpy(&value, r + place + lane * (sizeof(T) == 8 ? 8 : 4), sizeof(T));
        return value;
    }

    template <class T> void put(int place, int lane, T value) {
        if constexpr (sizeof(T) == 8) {
            memcpy(r + place + 8 * lane, &value, 8);
        } else {
            uint32_t word = 0;
            memcpy(&word, &value, sizeof(T));
            memcpy(r + place + 4 * lane, &word, 4);
        }
    }

    enum class space { generic, global, shared, local, parameter };

    // Memory that a lane reads or writes, checked.
    uint8_t * at(space s, uint64_t address, unsigned size, bool write, int lane) {
        if (address % size != 0) {
            fail("an address that is not a multiple of " + std::to_string(size), address, lane);
        }
        if (s == space::generic) {
            const auto host = (uint8_t *) address;
            if (host >= shared.data() && host < shared.data() + shared.size()) {
                s       = space::shared;
                address = host - shared.data();
            } else if (host >= current->local.data() && host < current->local.data() + current->local.size()) {
                return host;
            } else {
                s = space::global;
            }
        }
        switch (s) {
            case space::shared: {
                if (address + size > shared.size()) {
                    fail("beyond the " + std::to_string(shared.size()) + " bytes of shared memory", address, lane);
                }
                int          other = -1;
                const char * why   = races.access((int) address, (int) size, write, 32 * warp_index + lane, warp_index, other);
                if (why != nullptr) {
                    fail("shared memory " + std::string(why) + (other >= 0 ? ", by thread " + std::to_string(other) : ""), address, lane);
                }
                return shared.data() + address;
            }
            case space::local:
                if (address + size > f.local_bytes) {
                    fail("beyond the thread's memory", address, lane);
                }
                return current->local.data() + lane * f.local_bytes + address;
            case space::parameter: {
                const auto host = (uint8_t *) address;
                if (write || host < args.data() || host + size > args.data() + f.parameter_bytes) {
                    fail("beyond the parameters", address, lane);
                }
                return host;
            }
            default: break;
        }
        if (!memory.contains(address, size)) {
            fail("memory that is not the device's", address, lane);
        }
        int64_t      other = 0;
        const char * why   = global_races.access(address, size, write, first_thread + 32 * warp_index + lane, other);
        if (why != nullptr) {
            fail("memory " + std::string(why) + ", thread " + std::to_string(other % g.n_threads) + " of block " + std::to_string(other / g.n_threads),
                 address, lane);
        }
        return (uint8_t *) address;
    }

    // where shared memory begins among generic addresses
    uint64_t generic_shared() const { return (uint64_t) (uintptr_t) shared.data(); }
    uint64_t generic_local(int lane) const { return (uint64_t) (uintptr_t) (current->local.data() + lane * f.local_bytes); }

    void count_global(const uint64_t * addresses, uint32_t lanes, unsigned size) {
        uint64_t sectors[32];
        int      n_lanes = 0;
        for (int l = 0; l < 32; l++) {
            if (lanes >> l & 1) {
                sectors[n_lanes++] = addresses[l] / 32;
            }
        }
        std::sort(sectors, sectors + n_lanes);
        n.global_requests++;
        n.global_bytes += (uint64_t) n_lanes * size;
        n.global_sectors += std::unique(sectors, sectors + n_lanes) - sectors;
    }

    // Lanes share a turn as far as they ask for 128 bytes together, and take one for each word that a bank has to give.
    void count_shared(const uint64_t * addresses, uint32_t lanes, unsigned size) {
        const int in_turn = size <= 4 ? 32 : 128 / size;
        n.shared_requests++;
        for (int first = 0; first < 32; first += in_turn) {
            uint64_t words[64];
            int      n_words = 0, most = 0, of_bank[32] = {};
            for (int l = first; l < first + in_turn; l++) {
                for (unsigned b = 0; (lanes >> l & 1) != 0 && b < (size + 3) / 4; b++) {
                    words[n_words++] = addresses[l] / 4 + b;
                }
            }
            std::sort(words, words + n_words);
            n_words = (int) (std::unique(words, words + n_words) - words);
            for (int w = 0; w < n_words; w++) {
                most = std::max(most, ++of_bank[words[w] % 32]);
            }
            n.shared_turns += most;
            n.shared_least += n_words > 0;
        }
    }

    [[noreturn]] void fail(const std::string & what, uint64_t address, int lane) const {
        char hex[32];
        snprintf(hex, sizeof(hex), "0x%llx", (unsigned long long) address);
        fail(what + " (at " + hex + "), thread " + std::to_string(32 * warp_index + lane));
    }

    [[noreturn]] void fail(const std::string & what) const {
        throw std::runtime_error(what + ", block (" + std::to_string(block_at[0]) + ", " + std::to_string(block_at[1]) + ", " +
                                 std::to_string(block_at[2]) + "), in \"" + f.text[now->line] + "\" of " + f.name);
    }

  private:
    struct warp {
        std::vector<uint8_t> registers, local;
        int                  pc[32];
        uint32_t             live = ALL, waiting = 0; // for the other lanes
    };

    void run_block(const int * at) {
        std::copy(at, at + 3, block_at);
        first_thread = ((int64_t) (at[2] * g.grid[1] + at[1]) * g.grid[0] + at[0]) * g.n_threads;
        std::fill(shared.begin(), shared.end(), (uint8_t) 0xff);
        races.begin();
        for (warp_index = 0; warp_index < (int) warps.size(); warp_index++) {
            start(warps[warp_index], at);
        }
        for (bool any = true; any;) {
            int n_waiting = 0;
            for (warp_index = 0; warp_index < (int) warps.size(); warp_index++) {
                warp & w = warps[warp_index];
                if (w.live != 0) {
                    run_warp(w);
                }
                n_waiting += w.live != 0;
            }
            if (n_waiting != 0 && n_waiting != (int) warps.size()) {
                fail("a barrier that other warps ended without");
            }
            if (n_waiting != 0 && std::any_of(warps.begin(), warps.end(), [&](const warp & w) { return w.pc[0] != warps[0].pc[0]; })) {
                fail("a barrier while other warps are at another one");
            }
            races.threadgroup_barrier();
            any = n_waiting != 0;
        }
    }

    void start(warp & w, const int * at) {
        r = w.registers.data();
        std::fill(w.registers.begin(), w.registers.end(), (uint8_t) 0xff);
        std::fill(w.local.begin(), w.local.end(), (uint8_t) 0xff);
        std::fill(w.pc, w.pc + 32, 0);
        w.live = ALL;
        const int specials[N_SPECIAL] = { 0, 0, at[0], at[1], at[2], g.n_threads, g.grid[0], g.grid[1], g.grid[2] };
        for (int l = 0; l < 32; l++) {
            for (const constant & c : f.constants) {
                c.wide ? put<uint64_t>(c.place, l, c.value) : put<uint32_t>(c.place, l, (uint32_t) c.value);
            }
            for (const constant & c : f.of_parameters) {
                put<uint64_t>(c.place, l, (uint64_t) (uintptr_t) args.data() + c.value);
            }
            for (int s = 0; s < N_SPECIAL; s++) {
                if (f.specials[s] >= 0) {
                    put<int32_t>(f.specials[s], l, s == TID_X ? 32 * warp_index + l : s == LANE ? l : specials[s]);
                }
            }
        }
    }

    // Which lanes go on, and from where: those whose code stands first. `next`: where others stand that they may meet.
    uint32_t choose(warp & w, int & pc, int & next) {
        pc = next = INT_MAX;
        for (int l = 0; l < 32; l++) {
            if ((w.live & ~w.waiting) >> l & 1) {
                pc = std::min(pc, w.pc[l]);
            }
        }
        if (pc == INT_MAX) {
            now = &f.code[w.pc[__builtin_ctz(w.live)]];
            fail("a part of the warp comes here, and the other one elsewhere or to its end");
        }
        uint32_t lanes = 0;
        for (int l = 0; l < 32; l++) {
            if (w.live >> l & 1 && w.pc[l] == pc) {
                lanes |= 1u << l;
            } else if (w.live >> l & 1 && w.pc[l] > pc) {
                next = std::min(next, w.pc[l]);
            }
        }
        w.waiting &= ~lanes;
        return lanes;
    }

    // until its barrier or its end
    void run_warp(warp & w) {
        current = &w;
        r       = w.registers.data();
        int        pc, next;
        uint32_t   lanes = choose(w, pc, next);
        const auto leave = [&] {
            for (int l = 0; l < 32; l++) {
                w.pc[l] = lanes >> l & 1 ? pc : w.pc[l];
            }
        };
        while (true) {
            if (pc >= next) {
                leave();
                lanes = choose(w, pc, next);
            }
            const instruction & i = f.code[pc];
            now                   = &i;
            uint32_t active       = lanes;
            if (i.guard >= 0) {
                for (int l = 0; l < 32; l++) {
                    if ((get<uint32_t>(i.guard, l) != 0) == i.guard_not) {
                        active &= ~(1u << l);
                    }
                }
            }
            n.instructions++;
            switch (i.what) {
                case kind::plain:
                    if (active != 0) {
                        i.run(*this, i, active);
                    }
                    pc++;
                    break;
                case kind::branch:
                    if (active == lanes) {
                        pc = i.target;
                        if (next != INT_MAX) { // it may have gone back beyond others
                            leave();
                            lanes = choose(w, pc, next);
                        }
                    } else if (active == 0) {
                        pc++;
                    } else {
                        for (int l = 0; l < 32; l++) {
                            if (lanes >> l & 1) {
                                w.pc[l] = active >> l & 1 ? i.target : pc + 1;
                            }
                        }
                        lanes = choose(w, pc, next);
                    }
                    break;
                case kind::exit:
                    w.live &= ~active;
                    lanes &= ~active;
                    pc++;
                    if (w.live == 0) {
                        return;
                    }
                    leave();
                    lanes = choose(w, pc, next);
                    break;
                case kind::warp:
                case kind::barrier:
                    if (active != lanes) {
                        fail("under a condition that not all lanes fulfil");
                    }
                    if (lanes != ALL) { // the others have to come
                        leave();
                        w.waiting |= lanes;
                        if (std::any_of(w.pc, w.pc + 32, [&](int other) { return other != pc; }) || w.live != ALL) {
                            lanes = choose(w, pc, next);
                            break;
                        }
                        lanes     = ALL;
                        next      = INT_MAX;
                        w.waiting = 0;
                    }
                    pc++;
                    if (i.what == kind::barrier) {
                        leave();
                        return;
                    }
                    i.run(*this, i, lanes);
                    break;
            }
        }
    }

    const function &      f;
    const geometry &      g;
    const device_memory & memory;
    std::vector<uint8_t>  shared;
    shared_memory_checker races;
    device_memory_checker global_races;
    std::vector<uint8_t>  args;
    std::vector<warp>     warps;
    counts                n;

    // what runs
    int                 block_at[3] = {};
    int64_t             first_thread = 0;
    int                 warp_index   = 0;
    warp *              current      = nullptr;
    uint8_t *           r            = nullptr; // its registers
    const instruction * now          = nullptr;
};

namespace {

using space = machine::space;

template <class F> void each(uint32_t lanes, const F & f) {
    if (lanes == ALL) {
        for (int l = 0; l < 32; l++) {
            f(l);
        }
        return;
    }
    for (int l = 0; l < 32; l++) {
        if (lanes >> l & 1) {
            f(l);
        }
    }
}

template <class R, class T, class OP> void unary(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) { m.put<R>(i.d[0], l, (R) OP()(m.get<T>(i.s[0], l))); });
}

template <class R, class T, class U, class OP> void binary(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) { m.put<R>(i.d[0], l, (R) OP()(m.get<T>(i.s[0], l), m.get<U>(i.s[1], l))); });
}

template <class R, class T, class U, class OP> void ternary(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) { m.put<R>(i.d[0], l, (R) OP()(m.get<T>(i.s[0], l), m.get<T>(i.s[1], l), m.get<U>(i.s[2], l))); });
}

//
// arithmetic; integers go round
//

template <class T> using word = std::conditional_t<std::is_floating_point_v<T>, T, std::make_unsigned_t<std::conditional_t<std::is_floating_point_v<T>, int, T>>>;

#define PTX_OP1(name, ...) \
    struct name {          \
        template <class T> auto operator()(T a) const { __VA_ARGS__ } \
    };
#define PTX_OP2(name, ...) \
    struct name {          \
        template <class T, class U> auto operator()(T a, U b) const { __VA_ARGS__ } \
    };
#define PTX_OP3(name, ...) \
    struct name {          \
        template <class T, class U> auto operator()(T a, T b, U c) const { __VA_ARGS__ } \
    };

template <class T> T product(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
        return a * b;
    } else {
        return (T) ((uint64_t) a * (uint64_t) b);
    }
}

PTX_OP1(op_mov, return a;)
PTX_OP1(op_neg, return (T) -(word<T>) a;)
PTX_OP1(op_abs, return (T) std::abs(a);)
PTX_OP1(op_not, return (T) ~a;)
PTX_OP1(op_not_predicate, return (T) (a == 0);)
PTX_OP1(op_rcp, return 1.0f / a;)
PTX_OP1(op_ex2, { const float y = std::exp2((float) a); return std::fabs(y) < 1.17549435e-38f ? 0.0f : y; }) // .ftz
PTX_OP1(op_lg2, return std::log2((float) a);)
PTX_OP1(op_sqrt, return std::sqrt((float) a);)
PTX_OP1(op_popc, return __builtin_popcountll((std::make_unsigned_t<T>) a);)
PTX_OP2(op_add, return (T) ((word<T>) a + (word<T>) b);)
PTX_OP2(op_sub, return (T) ((word<T>) a - (word<T>) b);)
PTX_OP2(op_mul, return product<T>(a, b);)
PTX_OP2(op_mul_hi, return (T) ((std::is_signed_v<T> ? (uint64_t) ((int64_t) a * b) : (uint64_t) a * b) >> 32);)
PTX_OP2(op_div, {
    if constexpr (std::is_floating_point_v<T>) {
        return a / b;
    } else {
        return (T) (b == 0 ? (T) -1 : b == (T) -1 && std::is_signed_v<T> ? (T) -(word<T>) a : a / b);
    }
})
PTX_OP2(op_rem, return (T) (b == 0 ? a : b == (T) -1 && std::is_signed_v<T> ? 0 : a % b);)
PTX_OP2(op_and, return (T) (a & b);)
PTX_OP2(op_or, return (T) (a | b);)
PTX_OP2(op_xor, return (T) (a ^ b);)
PTX_OP2(op_shl, return (T) (b >= 8 * sizeof(T) ? 0 : (word<T>) a << b);)
PTX_OP2(op_shr, return (T) (b >= 8 * sizeof(T) ? (a < 0 ? -1 : 0) : a >> b);)
PTX_OP2(op_copysign, return std::copysign(b, a);)
PTX_OP3(op_mad, return op_add()(product<T>(a, b), c);)
PTX_OP3(op_fma, return std::fma(a, b, c);)
PTX_OP3(op_select, return c != 0 ? a : b;)

// Of a NaN and a number: the number, or with `nan` NaN.
template <bool LARGER, bool NAN_WINS> struct op_extreme {
    template <class T, class U> T operator()(T a, U b) const {
        if constexpr (std::is_floating_point_v<T>) {
            if (std::isnan(a) || std::isnan(b)) {
                return std::isnan(a) == NAN_WINS ? a : b;
            }
            if (a == 0 && b == 0) {
                return std::signbit(a) == LARGER ? b : a; // +0 is above -0
            }
        }
        return LARGER ? std::max<T>(a, b) : std::min<T>(a, b);
    }
};

struct op_add_rz {
    float operator()(float a, float b) const {
        const double exact = (double) a + b;
        const float  near  = (float) exact;
        return std::fabs((double) near) > std::fabs(exact) ? std::nextafter(near, 0.0f) : near;
    }
};

template <class T>
using wider = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                 std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

template <class T> void mul_wide(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) { m.put(i.d[0], l, (wider<T>) ((wider<T>) m.get<T>(i.s[0], l) * (wider<T>) m.get<T>(i.s[1], l))); });
}

template <class T> void mad_wide(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) {
        const auto product = (wider<T>) ((wider<T>) m.get<T>(i.s[0], l) * (wider<T>) m.get<T>(i.s[1], l));
        m.put(i.d[0], l, op_add()(product, m.get<wider<T>>(i.s[2], l)));
    });
}

void bfi(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) {
        const uint32_t at   = std::min(m.get<uint32_t>(i.s[2], l) & 255, 32u), n = std::min(m.get<uint32_t>(i.s[3], l) & 255, 32 - at);
        const uint32_t mask = n == 0 ? 0 : (ALL >> (32 - n)) << at;
        m.put<uint32_t>(i.d[0], l, (m.get<uint32_t>(i.s[1], l) & ~mask) | (m.get<uint32_t>(i.s[0], l) << (at & 31) & mask));
    });
}

// bytes of two words, by number
void prmt(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) {
        const uint64_t both = m.get<uint32_t>(i.s[0], l) | (uint64_t) m.get<uint32_t>(i.s[1], l) << 32;
        const uint32_t how  = m.get<uint32_t>(i.s[2], l);
        uint32_t       out  = 0;
        for (int b = 0; b < 4; b++) {
            const uint32_t which = how >> 4 * b & 15, byte = both >> 8 * (which & 7) & 255;
            out |= (which & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * b;
        }
        m.put<uint32_t>(i.d[0], l, out);
    });
}

//
// comparisons
//

template <class T, class COMPARE> void setp(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) { m.put<uint32_t>(i.d[0], l, COMPARE()(m.get<T>(i.s[0], l), m.get<T>(i.s[1], l))); });
}

template <class T, class COMPARE> void setp_and(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) { m.put<uint32_t>(i.d[0], l, COMPARE()(m.get<T>(i.s[0], l), m.get<T>(i.s[1], l)) && m.get<uint32_t>(i.s[2], l) != 0); });
}

template <class T, class COMPARE> void setp_or(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) { m.put<uint32_t>(i.d[0], l, COMPARE()(m.get<T>(i.s[0], l), m.get<T>(i.s[1], l)) || m.get<uint32_t>(i.s[2], l) != 0); });
}

template <class T> bool unordered(T a, T b) {
    return a != a || b != b;
}

PTX_OP2(op_eq, return a == b;)
PTX_OP2(op_ne, return !unordered<T>(a, b) && a != b;)
PTX_OP2(op_lt, return a < b;)
PTX_OP2(op_le, return a <= b;)
PTX_OP2(op_gt, return a > b;)
PTX_OP2(op_ge, return a >= b;)
PTX_OP2(op_equ, return unordered<T>(a, b) || a == b;)
PTX_OP2(op_neu, return unordered<T>(a, b) || a != b;)
PTX_OP2(op_ltu, return unordered<T>(a, b) || a < b;)
PTX_OP2(op_leu, return unordered<T>(a, b) || a <= b;)
PTX_OP2(op_gtu, return unordered<T>(a, b) || a > b;)
PTX_OP2(op_geu, return unordered<T>(a, b) || a >= b;)
PTX_OP2(op_num, return !unordered<T>(a, b);)
PTX_OP2(op_nan, return unordered<T>(a, b);)

//
// conversions
//

float as_float(f16 h) {
    static const std::vector<float> all = [] { // a table: a warp's products take a thousand of them
        std::vector<float> values(1 << 16);
        for (size_t i = 0; i < values.size(); i++) {
            values[i] = ggml_fp16_to_fp32((uint16_t) i);
        }
        return values;
    }();
    return all[h.bits];
}

f16 as_half(float x) {
    return { ggml_fp32_to_fp16(x) };
}

// sign or zeros fill what the type leaves of a register
template <class T> auto widened(T value) {
    if constexpr (std::is_signed_v<T> && std::is_integral_v<T> && sizeof(T) < 4) {
        return (int32_t) value;
    } else {
        return value;
    }
}

template <class TO, class FROM> struct op_convert {
    auto operator()(FROM x) const { return widened((TO) x); }
};

// to whole numbers; what doesn't fit becomes the nearest that does, NaN 0
template <class TO, int ROUND> struct op_to_integer {
    template <class T> auto operator()(T x) const {
        const T whole = ROUND == 'z' ? std::trunc(x) : ROUND == 'i' ? std::nearbyint(x) : ROUND == 'm' ? std::floor(x) : std::ceil(x);
        if constexpr (std::is_floating_point_v<TO>) {
            return (TO) whole;
        } else {
            constexpr TO least = std::numeric_limits<TO>::min(), most = std::numeric_limits<TO>::max();
            return widened(x != x ? (sizeof(TO) == 8 ? (TO) (1ull << 63) : (TO) 0) : whole <= (T) least ? least : whole >= (T) most ? most : (TO) whole);
        }
    }
};

struct op_to_half {
    uint16_t operator()(float x) const { return as_half(x).bits; }
};

struct op_from_half {
    float operator()(uint16_t x) const { return as_float({ x }); }
};

struct op_to_halves { // the first above the second
    uint32_t operator()(float a, float b) const { return (uint32_t) as_half(a).bits << 16 | as_half(b).bits; }
};

//
// moving
//

// {d, ...} = s or d = {s, ...}, of equal parts
template <class WHOLE, class PART> void mov_parts(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) {
        if (i.n_d > 1) {
            const WHOLE whole = m.get<WHOLE>(i.s[0], l);
            for (int p = 0; p < i.n_d; p++) {
                m.put<PART>(i.d[p], l, (PART) (whole >> 8 * sizeof(PART) * p));
            }
            return;
        }
        WHOLE whole = 0;
        for (int p = 0; p < i.n_s; p++) {
            whole |= (WHOLE) m.get<PART>(i.s[p], l) << 8 * sizeof(PART) * p;
        }
        m.put<WHOLE>(i.d[0], l, whole);
    });
}

void mov_b32(machine & m, const instruction & i, uint32_t lanes) {
    i.n_d > 1 || i.n_s > 1 ? mov_parts<uint32_t, uint16_t>(m, i, lanes) : unary<uint32_t, uint32_t, op_mov>(m, i, lanes);
}

void mov_b64(machine & m, const instruction & i, uint32_t lanes) {
    i.n_d > 1 || i.n_s > 1 ? mov_parts<uint64_t, uint32_t>(m, i, lanes) : unary<uint64_t, uint64_t, op_mov>(m, i, lanes);
}

void to_shared(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) { m.put<uint64_t>(i.d[0], l, m.get<uint64_t>(i.s[0], l) - m.generic_shared()); });
}

void from_shared(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) { m.put<uint64_t>(i.d[0], l, m.get<uint64_t>(i.s[0], l) + m.generic_shared()); });
}

void to_local(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) { m.put<uint64_t>(i.d[0], l, m.get<uint64_t>(i.s[0], l) - m.generic_local(l)); });
}

void from_local(machine & m, const instruction & i, uint32_t lanes) {
    each(lanes, [&](int l) { m.put<uint64_t>(i.d[0], l, m.get<uint64_t>(i.s[0], l) + m.generic_local(l)); });
}

//
// memory
//

uint64_t address_of(machine & m, const instruction & i, int lane) {
    return (i.wide ? m.get<uint64_t>(i.s[0], lane) : m.get<uint32_t>(i.s[0], lane)) + i.offset;
}

void count(machine & m, space s, const uint64_t * addresses, uint32_t lanes, unsigned size) {
    if (s == space::global) {
        m.count_global(addresses, lanes, size);
    } else if (s == space::shared) {
        m.count_shared(addresses, lanes, size);
    }
}

template <space S, class T, int N> void load(machine & m, const instruction & i, uint32_t lanes) {
    uint64_t addresses[32];
    each(lanes, [&](int l) {
        addresses[l]      = address_of(m, i, l);
        const uint8_t * p = m.at(S, addresses[l], N * sizeof(T), false, l);
        for (int e = 0; e < N; e++) {
            T value;
            memcpy(&value, p + e * sizeof(T), sizeof(T));
            if constexpr (std::is_integral_v<T>) {
                i.widens ? m.put(i.d[e], l, (int64_t) value) : m.put(i.d[e], l, widened(value)); // unsigned ones get zeros
            } else {
                m.put(i.d[e], l, value);
            }
        }
    });
    count(m, S, addresses, lanes, N * sizeof(T));
}

template <space S, class T, int N> void store(machine & m, const instruction & i, uint32_t lanes) {
    uint64_t addresses[32];
    each(lanes, [&](int l) {
        addresses[l] = address_of(m, i, l);
        uint8_t * p  = m.at(S, addresses[l], N * sizeof(T), true, l);
        for (int e = 0; e < N; e++) {
            const T value = m.get<T>(i.s[1 + e], l);
            memcpy(p + e * sizeof(T), &value, sizeof(T));
        }
    });
    count(m, S, addresses, lanes, N * sizeof(T));
}

//
// of a warp
//

void need_all(machine & m, int mask_place) {
    for (int l = 0; l < 32; l++) {
        if (m.get<uint32_t>(mask_place, l) != ALL) {
            m.fail("not for all lanes of the warp");
        }
    }
}

enum class shuffle { butterfly, index, up, down };

template <shuffle HOW> void shfl(machine & m, const instruction & i, uint32_t) {
    need_all(m, i.s[3]);
    uint32_t given[32];
    for (int l = 0; l < 32; l++) {
        given[l] = m.get<uint32_t>(i.s[0], l);
    }
    for (int l = 0; l < 32; l++) {
        const int b = (int) (m.get<uint32_t>(i.s[1], l) & 31), c = (int) m.get<uint32_t>(i.s[2], l);
        const int segment = c >> 8 & 31, last = (l & segment) | (c & 31 & ~segment), first = l & segment;
        const int from    = HOW == shuffle::butterfly ? l ^ b : HOW == shuffle::index ? first | (b & ~segment) : HOW == shuffle::up ? l - b : l + b;
        const bool inside = HOW == shuffle::up ? from >= last : from <= last;
        m.put<uint32_t>(i.d[0], l, given[inside ? from : l]);
        if (i.n_d > 1) {
            m.put<uint32_t>(i.d[1], l, inside);
        }
    }
}

void ballot(machine & m, const instruction & i, uint32_t) {
    need_all(m, i.s[1]);
    uint32_t all = 0;
    for (int l = 0; l < 32; l++) {
        all |= (uint32_t) (m.get<uint32_t>(i.s[0], l) != 0) << l;
    }
    for (int l = 0; l < 32; l++) {
        m.put<uint32_t>(i.d[0], l, all);
    }
}

// A lane holds elements 2 (lane % 4) and the next of row lane / 4 of an 8 x 8 matrix of 16 bits.
void spread(machine & m, int place, const uint16_t (&matrix)[8][8], bool transposed) {
    for (int l = 0; l < 32; l++) {
        const int row = l / 4, column = l % 4 * 2;
        const uint16_t a = transposed ? matrix[column][row] : matrix[row][column];
        const uint16_t b = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
        m.put<uint32_t>(place, l, a | (uint32_t) b << 16);
    }
}

void movmatrix(machine & m, const instruction & i, uint32_t) {
    uint16_t matrix[8][8];
    for (int l = 0; l < 32; l++) {
        const uint32_t two            = m.get<uint32_t>(i.s[0], l);
        matrix[l / 4][l % 4 * 2]     = (uint16_t) two;
        matrix[l / 4][l % 4 * 2 + 1] = (uint16_t) (two >> 16);
    }
    spread(m, i.d[0], matrix, true);
}

template <bool TRANSPOSED> void ldmatrix(machine & m, const instruction & i, uint32_t) {
    for (int k = 0; k < 4; k++) {
        uint16_t matrix[8][8];
        uint64_t addresses[32] = {};
        for (int row = 0; row < 8; row++) {
            const int lane  = 8 * k + row;
            addresses[row]  = address_of(m, i, lane);
            const auto from = m.at(space::shared, addresses[row], 16, false, lane);
            memcpy(matrix[row], from, 16);
        }
        m.count_shared(addresses, 0xff, 16);
        spread(m, i.d[k], matrix, TRANSPOSED);
    }
}

// As matrix units do it: exact products and what they are added to are cut off at 24 bits below the largest of them, eight products
// at a time (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021; the oldest cut most).
float add_up(float sum, const float * a, const float * b, int n) {
    for (int first = 0; first < n; first += 8) {
        double term[9] = { sum };
        double largest = std::fabs(sum);
        for (int k = 0; k < 8; k++) {
            term[1 + k] = (double) a[first + k] * b[first + k];
            largest     = std::max(largest, std::fabs(term[1 + k]));
        }
        if (largest == 0.0 || !std::isfinite(largest)) {
            for (int k = 0; k < 8; k++) {
                sum += (float) term[1 + k];
            }
            continue;
        }
        double total = 0.0;
        for (const double t : term) {
            total += std::trunc(std::ldexp(t, 23 - std::ilogb(largest)));
        }
        total           = std::ldexp(total, std::ilogb(largest) - 23);
        const auto near = (float) total;
        sum             = std::fabs((double) near) > std::fabs(total) ? std::nextafter(near, 0.0f) : near;
        for (const double t : term) {
            sum = std::isnan(t) ? (float) t : sum;
        }
    }
    return sum;
}

// d = a b + c, 16 x 8, depth 16 or 8
template <int DEPTH> void mma(machine & m, const instruction & i, uint32_t) {
    constexpr int N_A = DEPTH / 4, N_B = DEPTH / 8;
    float         a[16][DEPTH], b[8][DEPTH];
    const auto    half = [](uint32_t two, int which) { return as_float({ (uint16_t) (two >> 16 * which) }); };
    for (int l = 0; l < 32; l++) {
        for (int e = 0; e < 2; e++) {
            for (int k = 0; k < N_A; k++) {
                a[l / 4 + 8 * (k % 2)][l % 4 * 2 + e + 8 * (k / 2)] = half(m.get<uint32_t>(i.s[k], l), e);
            }
            for (int k = 0; k < N_B; k++) {
                b[l / 4][l % 4 * 2 + e + 8 * k] = half(m.get<uint32_t>(i.s[N_A + k], l), e);
            }
        }
    }
    for (int l = 0; l < 32; l++) {
        for (int e = 0; e < 4; e++) {
            const float c = m.get<float>(i.s[N_A + N_B + e], l);
            m.put<float>(i.d[e], l, add_up(c, a[l / 4 + 8 * (e / 2)], b[l % 4 * 2 + e % 2], DEPTH));
        }
    }
}

//
// opcodes
//

std::vector<std::string> parts_of(const std::string & opcode) {
    std::vector<std::string> parts;
    size_t                   begin = 0;
    while (begin <= opcode.size()) {
        const size_t end = std::min(opcode.find('.', begin), opcode.size());
        parts.push_back(opcode.substr(begin, end - begin));
        begin = end + 1;
    }
    return parts;
}

// f(T()) for a type's name; NULL: it is none of those of F
template <class F> handler for_integer(const std::string & type, const F & f) {
    if (type == "u32" || type == "b32") return f(uint32_t());
    if (type == "s32") return f(int32_t());
    if (type == "u64" || type == "b64") return f(uint64_t());
    if (type == "s64") return f(int64_t());
    if (type == "u16" || type == "b16") return f(uint16_t());
    if (type == "s16") return f(int16_t());
    return nullptr;
}

template <class F> handler for_number(const std::string & type, const F & f) {
    return type == "f32" ? f(float()) : type == "f64" ? f(double()) : for_integer(type, f);
}

template <class F> handler for_stored(const std::string & type, const F & f) {
    return type == "u8" || type == "b8" ? f(uint8_t()) : type == "s8" ? f(int8_t()) : for_number(type, f);
}

template <class OP> handler two(const std::string & type) {
    return for_number(type, [](auto t) -> handler { return binary<decltype(t), decltype(t), decltype(t), OP>; });
}

template <class OP> handler two_integers(const std::string & type) {
    return for_integer(type, [](auto t) -> handler { return binary<decltype(t), decltype(t), decltype(t), OP>; });
}

template <class OP> handler shift(const std::string & type) {
    return for_integer(type, [](auto t) -> handler { return binary<decltype(t), decltype(t), uint32_t, OP>; });
}

template <class OP> handler two_bits(const std::string & type) {
    return type == "pred" ? binary<uint32_t, uint32_t, uint32_t, OP> : two_integers<OP>(type);
}

template <class T, class COMPARE> handler with(const std::string & boolean) {
    return boolean.empty() ? setp<T, COMPARE> : boolean == "and" ? setp_and<T, COMPARE> : boolean == "or" ? setp_or<T, COMPARE> : (handler) nullptr;
}

handler comparison(const std::string & how, const std::string & boolean, const std::string & type) {
    return for_number(type, [&](auto t) -> handler {
        using T = decltype(t);
        if (how == "eq") return with<T, op_eq>(boolean);
        if (how == "ne") return with<T, op_ne>(boolean);
        if (how == "lt" || how == "lo") return with<T, op_lt>(boolean);
        if (how == "le" || how == "ls") return with<T, op_le>(boolean);
        if (how == "gt" || how == "hi") return with<T, op_gt>(boolean);
        if (how == "ge" || how == "hs") return with<T, op_ge>(boolean);
        if (how == "equ") return with<T, op_equ>(boolean);
        if (how == "neu") return with<T, op_neu>(boolean);
        if (how == "ltu") return with<T, op_ltu>(boolean);
        if (how == "leu") return with<T, op_leu>(boolean);
        if (how == "gtu") return with<T, op_gtu>(boolean);
        if (how == "geu") return with<T, op_geu>(boolean);
        if (how == "num") return with<T, op_num>(boolean);
        if (how == "nan") return with<T, op_nan>(boolean);
        return nullptr;
    });
}

template <class TO, class FROM> handler to_integer(const std::string & round) {
    return round == "rzi" ? unary<decltype(widened(TO())), FROM, op_to_integer<TO, 'z'>> :
           round == "rni" ? unary<decltype(widened(TO())), FROM, op_to_integer<TO, 'i'>> :
           round == "rmi" ? unary<decltype(widened(TO())), FROM, op_to_integer<TO, 'm'>> :
           round == "rpi" ? unary<decltype(widened(TO())), FROM, op_to_integer<TO, 'p'>> :
                            (handler) nullptr;
}

handler conversion(const std::vector<std::string> & p) {
    const std::string & to = p[p.size() - 2], & from = p.back(), round = p.size() > 3 ? p[1] : "";
    if (p.size() > 4 || (!round.empty() && round[0] != 'r') || round == "relu") return nullptr;
    if (to == "f16x2") return round == "rn" ? binary<uint32_t, float, float, op_to_halves> : (handler) nullptr;
    if (to == "f16") return from == "f32" && round == "rn" ? unary<uint16_t, float, op_to_half> : (handler) nullptr;
    if (from == "f16") return to == "f32" ? unary<float, uint16_t, op_from_half> : (handler) nullptr;
    return for_stored(to, [&](auto t) -> handler {
        using TO = decltype(t);
        return for_stored(from, [&](auto s) -> handler {
            using FROM = decltype(s);
            if constexpr (std::is_floating_point_v<FROM> && sizeof(TO) > 1) {
                if (!round.empty() && round.back() == 'i') return to_integer<TO, FROM>(round);
            }
            if (std::is_floating_point_v<FROM> && std::is_integral_v<TO>) return nullptr; // how to round?
            if (!round.empty() && round != "rn") return nullptr;
            return unary<decltype(widened(TO())), FROM, op_convert<TO, FROM>>;
        });
    });
}

template <space S, class T> handler transfer(bool loads, int n) {
    switch (n) {
        case 1: return loads ? load<S, T, 1> : store<S, T, 1>;
        case 2: return loads ? load<S, T, 2> : store<S, T, 2>;
        case 4: return loads ? load<S, T, 4> : store<S, T, 4>;
        default: return nullptr;
    }
}

handler memory(const std::vector<std::string> & p) {
    int   n = 1;
    space s = space::generic;
    for (size_t i = 1; i + 1 < p.size(); i++) {
        if (p[i] == "v2" || p[i] == "v4") {
            n = p[i][1] - '0';
        } else if (p[i] == "global") {
            s = space::global;
        } else if (p[i] == "shared") {
            s = space::shared;
        } else if (p[i] == "local") {
            s = space::local;
        } else if (p[i] == "param") {
            s = space::parameter;
        } else if (p[i] != "nc") {
            return nullptr;
        }
    }
    return for_stored(p.back(), [&](auto t) -> handler {
        using T          = decltype(t);
        const bool loads = p[0] == "ld";
        switch (s) {
            case space::global: return transfer<space::global, T>(loads, n);
            case space::shared: return transfer<space::shared, T>(loads, n);
            case space::local: return transfer<space::local, T>(loads, n);
            case space::parameter: return transfer<space::parameter, T>(loads, n);
            default: return transfer<space::generic, T>(loads, n);
        }
    });
}

handler address_space(const std::vector<std::string> & p) {
    const bool          to = p.size() > 2 && p[1] == "to";
    const std::string & s  = p[to ? 2 : 1];
    return s == "shared" ? (to ? to_shared : from_shared) : s == "local" ? (to ? to_local : from_local) : unary<uint64_t, uint64_t, op_mov>;
}

// Whether all that stands between an opcode's first and last part is what its handler does.
bool known_modifiers(const std::vector<std::string> & p) {
    static const std::map<std::string, std::vector<std::string>> known = {
        { "add", { "", "rn", "rz" } }, { "sub", { "", "rn" } },          { "mul", { "", "rn", "lo", "hi", "wide" } }, { "mad", { "lo", "wide" } },
        { "fma", { "rn" } },           { "div", { "", "rn", "full" } },  { "min", { "", "NaN" } },                   { "max", { "", "NaN" } },
        { "rcp", { "rn", "approx" } }, { "sqrt", { "rn", "approx" } },   { "ex2", { "approx.ftz" } },                { "lg2", { "approx" } },
        { "ld", {} },                  { "st", {} },                     { "cvta", {} },                             { "cvt", {} },
        { "setp", {} }, // these look for themselves
    };
    std::string between;
    for (size_t i = 1; i + 1 < p.size(); i++) {
        between += (i > 1 ? "." : "") + p[i];
    }
    const auto found = known.find(p[0]);
    return found == known.end() ? between.empty() : found->second.empty() || std::find(found->second.begin(), found->second.end(), between) != found->second.end();
}

handler plain(const std::vector<std::string> & p) {
    const std::string & op = p[0], & type = p.back(), how = p.size() > 2 ? p[1] : "";
    if (!known_modifiers(p)) return nullptr;
    if (op == "ld" || op == "st") return memory(p);
    if (op == "mov") {
        if (type == "b32") return mov_b32;
        if (type == "b64") return mov_b64;
        if (type == "pred") return unary<uint32_t, uint32_t, op_mov>;
        return for_number(type, [](auto t) -> handler { return unary<decltype(t), decltype(t), op_mov>; });
    }
    if (op == "cvta") return address_space(p);
    if (op == "cvt") return conversion(p);
    if (op == "setp") return p.size() <= 4 ? comparison(p[1], p.size() > 3 ? p[2] : "", type) : (handler) nullptr;
    if (op == "selp") return for_number(type, [](auto t) -> handler { return ternary<decltype(t), decltype(t), uint32_t, op_select>; });
    if (op == "add" && how == "rz") return type == "f32" ? binary<float, float, float, op_add_rz> : (handler) nullptr;
    if (op == "add") return two<op_add>(type);
    if (op == "sub") return two<op_sub>(type);
    if (op == "mul") {
        if (how == "wide") return for_integer(type, [](auto t) -> handler { return mul_wide<decltype(t)>; });
        if (how == "hi") return type == "s32" ? binary<int32_t, int32_t, int32_t, op_mul_hi> : type == "u32" ? binary<uint32_t, uint32_t, uint32_t, op_mul_hi> : (handler) nullptr;
        return two<op_mul>(type);
    }
    if (op == "mad" || op == "fma") {
        if (how == "wide") return for_integer(type, [](auto t) -> handler { return mad_wide<decltype(t)>; });
        if (type == "f32") return op == "fma" ? ternary<float, float, float, op_fma> : (handler) nullptr;
        return how == "lo" ? for_integer(type, [](auto t) -> handler { return ternary<decltype(t), decltype(t), decltype(t), op_mad>; }) : (handler) nullptr;
    }
    if (op == "div") return two<op_div>(type);
    if (op == "rem") return two_integers<op_rem>(type);
    if (op == "min") return how == "NaN" ? two<op_extreme<false, true>>(type) : two<op_extreme<false, false>>(type);
    if (op == "max") return how == "NaN" ? two<op_extreme<true, true>>(type) : two<op_extreme<true, false>>(type);
    if (op == "neg") return for_number(type, [](auto t) -> handler { return unary<decltype(t), decltype(t), op_neg>; });
    if (op == "abs") return type == "f32" ? unary<float, float, op_abs> : type == "s32" ? unary<int32_t, int32_t, op_abs> : (handler) nullptr;
    if (op == "and") return two_bits<op_and>(type);
    if (op == "or") return two_bits<op_or>(type);
    if (op == "xor") return two_bits<op_xor>(type);
    if (op == "not") return type == "pred" ? unary<uint32_t, uint32_t, op_not_predicate> : for_integer(type, [](auto t) -> handler { return unary<decltype(t), decltype(t), op_not>; });
    if (op == "shl") return shift<op_shl>(type);
    if (op == "shr") return shift<op_shr>(type);
    if (op == "popc") return type == "b32" ? unary<uint32_t, uint32_t, op_popc> : (handler) nullptr;
    if (op == "bfi" && type == "b32") return bfi;
    if (op == "prmt" && p.size() == 2) return prmt;
    if (op == "copysign" && type == "f32") return binary<float, float, float, op_copysign>;
    if (op == "rcp" && type == "f32") return unary<float, float, op_rcp>;
    if (op == "ex2" && type == "f32") return unary<float, float, op_ex2>;
    if (op == "lg2" && type == "f32") return unary<float, float, op_lg2>;
    if (op == "sqrt" && type == "f32") return unary<float, float, op_sqrt>;
    return nullptr;
}

handler of_warp(const std::string & opcode) {
    if (opcode == "shfl.sync.bfly.b32") return shfl<shuffle::butterfly>;
    if (opcode == "shfl.sync.idx.b32") return shfl<shuffle::index>;
    if (opcode == "shfl.sync.up.b32") return shfl<shuffle::up>;
    if (opcode == "shfl.sync.down.b32") return shfl<shuffle::down>;
    if (opcode == "vote.sync.ballot.b32") return ballot;
    if (opcode == "movmatrix.sync.aligned.m8n8.trans.b16") return movmatrix;
    if (opcode == "ldmatrix.sync.aligned.m8n8.x4.shared.b16") return ldmatrix<false>;
    if (opcode == "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16") return ldmatrix<true>;
    if (opcode == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") return mma<16>;
    if (opcode == "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32") return mma<8>;
    return nullptr;
}

} // namespace

handler handler_for(const std::string & opcode, kind & what) {
    what = opcode == "bra" || opcode == "bra.uni" ? kind::branch :
           opcode == "ret" || opcode == "exit"    ? kind::exit :
           opcode == "bar.sync"                   ? kind::barrier :
                                                    kind::plain;
    if (what != kind::plain) {
        return nullptr;
    }
    handler found = of_warp(opcode);
    what          = found != nullptr ? kind::warp : kind::plain;
    found         = found != nullptr ? found : plain(parts_of(opcode));
    if (found == nullptr) {
        throw std::runtime_error("an instruction that is not known: " + opcode);
    }
    return found;
}

counts run(const function & kernel, const geometry & g, const void * const * args, const device_memory & memory) {
    return machine(kernel, g, args, memory).run();
}

} // namespace ptx
