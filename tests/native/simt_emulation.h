// simt_emulation.h: runs a kernel body of ggml_qcache/gpu/ on the CPU, thread block by thread block
//
// What a GPU would hang on or leave undefined ends the run with an error; see fibers.h.

#pragma once

#include "fibers.h"
#include "gpu/simt.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {

class block;

// what a body sees; see ggml_qcache/gpu/simt.h
class thread_view {
  public:
    thread_view(block & b, int id) : b(b), id(id) {}

    int    index() const { return id; }
    int    lane() const { return id % 32; }
    int    warp() const { return id / 32; }
    int    block_x() const;
    int    block_y() const;
    int    block_z() const;
    void * shared() const;
    void   sync();

    template <typename V> V shuffle_xor(V value, int mask) { return shuffle(value, lane() ^ mask); }
    template <typename V> V shuffle(V value, int from_lane);

    uint32_t ballot(bool holds);
    uint32_t transpose(uint32_t word); // movmatrix

    // m = the four 8 x 8 matrices of a tile of 16 x 16; lane 8 i + j names row j of matrix i, as in the PTX manual (ldmatrix)
    void load_matrices(uint32_t * m, const uint16_t * tile, int stride, bool down) { load(m, tile, stride, down, false); }
    void load_matrices_transposed(uint32_t * m, const uint16_t * tile, int stride, bool down) { load(m, tile, stride, down, true); }

    // d += A B, m16n8k16; the places of the elements in the lanes' registers are those of the PTX manual
    void mma(float * d, const uint32_t * a, const uint32_t * b);

  private:
    void load(uint32_t * m, const uint16_t * tile, int stride, bool down, bool transposed);

    block & b;
    int     id;
};

class block {
  public:
    explicit block(int shared_bytes) : shared_memory(shared_bytes) {}

    int index[3] = { 0, 0, 0 };

    template <class Body> void run(const Body & body) {
        std::fill(shared_memory.begin(), shared_memory.end(), (uint8_t) 0xff); // NaN: nothing may rely on what lies there
        threads.run(QG_THREADS, [&](int i) {
            thread_view view(*this, i);
            body(view);
        });
    }

  private:
    friend class thread_view;

    struct exchange_slot {
        uint32_t words[6];
    };

    // Two turns of slots: a lane can be one exchange ahead of those that have not read yet, never two.
    exchange_slot * exchange(int i, const uint32_t * words, int n) {
        exchange_slot * turn = slots[threads.n_meetings(i) % 2];
        memcpy(turn[i].words, words, n * sizeof(uint32_t));
        threads.meet(i);
        return turn + i / 32 * 32;
    }

    std::vector<uint8_t> shared_memory;
    fibers               threads;
    exchange_slot        slots[2][QG_THREADS];
};

inline int    thread_view::block_x() const { return b.index[0]; }
inline int    thread_view::block_y() const { return b.index[1]; }
inline int    thread_view::block_z() const { return b.index[2]; }
inline void * thread_view::shared() const { return b.shared_memory.data(); }
inline void   thread_view::sync() { b.threads.barrier(id); }

template <typename V> V thread_view::shuffle(V value, int from_lane) {
    static_assert(sizeof(V) == sizeof(uint32_t), "one register");
    uint32_t word;
    memcpy(&word, &value, sizeof(word));
    const auto * warp = b.exchange(id, &word, 1);
    memcpy(&value, &warp[from_lane].words[0], sizeof(value));
    return value;
}

inline uint32_t thread_view::ballot(bool holds) {
    const uint32_t word = holds;
    const auto *   warp = b.exchange(id, &word, 1);
    uint32_t       all  = 0;
    for (int i = 0; i < 32; i++) {
        all |= warp[i].words[0] << i;
    }
    return all;
}

inline uint32_t thread_view::transpose(uint32_t word) {
    const auto * warp = b.exchange(id, &word, 1);
    const int    row = lane() % 4 * 2, column = lane() / 4; // of the matrix that is given
    const auto   at = [&](int r) {
        return warp[4 * r + column / 2].words[0] >> 16 * (column % 2) & 0xffff;
    };
    return at(row) | at(row + 1) << 16;
}

inline void thread_view::load(uint32_t * m, const uint16_t * tile, int stride, bool down, bool transposed) {
    const uint16_t * own = tile + qg_row_of_matrices(lane(), stride, down);
    if ((uintptr_t) own % 16 != 0) {
        throw std::runtime_error("a row of a matrix begins at " + std::to_string((uintptr_t) own % 16) + " of 16 bytes");
    }
    uint32_t words[2];
    memcpy(words, &own, sizeof(own));
    const auto * warp = b.exchange(id, words, 2);
    const auto   at   = [&](int matrix, int row, int column) {
        const uint16_t * of_lane;
        memcpy(&of_lane, warp[8 * matrix + row].words, sizeof(of_lane));
        return (uint32_t) of_lane[column];
    };
    const int major = lane() / 4, minor = lane() % 4 * 2;
    for (int i = 0; i < 4; i++) {
        m[i] = transposed ? at(i, minor, major) | at(i, minor + 1, major) << 16 : at(i, major, minor) | at(i, major, minor + 1) << 16;
    }
}

inline void thread_view::mma(float * d, const uint32_t * a, const uint32_t * b_words) {
    const uint32_t words[6] = { a[0], a[1], a[2], a[3], b_words[0], b_words[1] };
    const auto *   warp     = b.exchange(id, words, 6);
    const auto     half     = [](uint32_t word, int k) { return qg_from_half((uint16_t) (word >> 16 * (k % 2))); };
    for (int k = 0; k < 16; k++) {
        const int of_k = k % 8 / 2;
        for (int r = 0; r < 2; r++) {
            const float left = half(warp[lane() / 4 * 4 + of_k].words[r + (k >= 8 ? 2 : 0)], k);
            for (int e = 0; e < 2; e++) {
                const int column = lane() % 4 * 2 + e;
                d[2 * r + e] += left * half(warp[column * 4 + of_k].words[4 + (k >= 8)], k);
            }
        }
    }
}

// Runs body(thread) for every thread of every block of the grid.
template <class Body> void launch(const int grid[3], int shared_bytes, const Body & body) {
    block b(shared_bytes);
    for (b.index[2] = 0; b.index[2] < grid[2]; b.index[2]++) {
        for (b.index[1] = 0; b.index[1] < grid[1]; b.index[1]++) {
            for (b.index[0] = 0; b.index[0] < grid[0]; b.index[0]++) {
                b.run(body);
            }
        }
    }
}

} // namespace simt
