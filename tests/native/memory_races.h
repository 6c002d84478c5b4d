// memory_races.h: which accesses of memory are ordered by barriers, and which are not
//
// Memory of a thread block (a threadgroup): two threads that touch the same bytes, one of them writing, need a barrier of the block
// between them or, in the same warp (SIMD group), one of the warp. Nothing may be read before it was written. Device memory: what
// one thread of a launch writes, no other may touch; no kernel needs it otherwise.

#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

class shared_memory_checker {
  public:
    static constexpr int ALL_LANES = -1; // instead of a thread: a function of its whole SIMD group

    explicit shared_memory_checker(int n_bytes) : granules((n_bytes + 1) / 2) {}

    void begin() { first_epoch = ++epoch; } // a threadgroup
    void threadgroup_barrier() { epoch++; }
    void simdgroup_barrier(int warp) { warp_epoch[warp]++; }

    // What is wrong with an access, or NULL. `other` becomes the thread it collides with.
    const char * access(int at, int size, bool write, int thread, int warp, int & other) {
        for (int i = at / 2; i < (at + size + 1) / 2; i++) {
            granule &  g     = granules[i];
            const auto since = warp_epoch[warp];
            if (!write && g.write_epoch < first_epoch) {
                return "is read before anything was written there";
            }
            if (g.write_epoch == epoch && !ordered(g.writer_warp, g.writer, g.write_since, thread, warp)) {
                other = g.writer;
                return write ? "is written by two threads without a barrier between them" : "is read without a barrier after it was written";
            }
            if (write) {
                if (g.read_epoch == epoch && !ordered(g.reader_warp, g.reader, g.read_since, thread, warp)) {
                    other = g.reader;
                    return "is written without a barrier after it was read";
                }
                g.write_epoch = epoch;
                g.write_since = since;
                g.writer      = (int16_t) thread;
                g.writer_warp = (int8_t) warp;
                continue;
            }
            // readers since the last barrier: one thread, several of a SIMD group since its last barrier, or several SIMD groups
            if (g.read_epoch != epoch || (g.reader_warp == warp && g.read_since != since)) {
                g.reader      = (int16_t) thread;
                g.reader_warp = (int8_t) warp;
            } else if (g.reader_warp != warp) {
                g.reader      = ALL_LANES;
                g.reader_warp = SEVERAL;
            } else if (g.reader != thread) {
                g.reader = ALL_LANES;
            }
            g.read_epoch = epoch;
            g.read_since = since;
        }
        return nullptr;
    }

  private:
    static constexpr int8_t SEVERAL = -1;

    // two bytes
    struct granule {
        uint32_t write_epoch = 0, write_since = 0, read_epoch = 0, read_since = 0; // since: the SIMD group's barriers
        int16_t  writer = 0, reader = 0;
        int8_t   writer_warp = 0, reader_warp = 0;
    };

    // an access of the same epoch, and one that comes now
    bool ordered(int before_warp, int before, uint32_t before_since, int thread, int warp) const {
        return before_warp == warp && (before_since != warp_epoch[warp] || (before == thread && thread != ALL_LANES));
    }

    std::vector<granule>     granules;
    uint32_t                 epoch = 0, first_epoch = 0;
    std::array<uint32_t, 32> warp_epoch = {};
};

class device_memory_checker {
  public:
    const char * access(uintptr_t at, unsigned size, bool write, int64_t thread, int64_t & other) {
        for (uintptr_t a = at; a < at + size; a++) {
            owners * page = find(a / PAGE, write);
            if (page == nullptr) {
                continue;
            }
            int64_t & owner = (*page)[a % PAGE];
            if (owner != 0 && owner != thread + 1) {
                other = owner - 1;
                return write ? "is written by two threads" : "is read by another thread than wrote it";
            }
            owner = write ? thread + 1 : owner;
        }
        return nullptr;
    }

  private:
    static constexpr uintptr_t PAGE = 4096;
    using owners                    = std::array<int64_t, PAGE>; // of each byte, the thread that wrote it, plus 1

    owners * find(uintptr_t number, bool make) {
        if (number != last_number || (make && last == nullptr)) {
            last_number = number;
            const auto found = pages.find(number);
            last             = found == pages.end() ? nullptr : found->second.get();
            if (make && last == nullptr) {
                last = (pages[number] = std::make_unique<owners>()).get();
            }
        }
        return last;
    }

    std::unordered_map<uintptr_t, std::unique_ptr<owners>> pages;
    uintptr_t                                              last_number = 0;
    owners *                                               last        = nullptr;
};
