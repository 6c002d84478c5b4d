// bench_lazy_attn.cpp: one decode step of the lazy-attention kernel alone, against the speed at which memory can be read
//
// Each case is first compared with the scalar kernel, then timed. Every run reads another copy of the cache, so many that
// none is still in a processor cache when its turn comes again. What counts as read: K of keys whose logits are computed,
// V of all, and 4 bytes a head and key where logits come from the score cache. How fast memory can be read is found on the same
// memory: where it lies makes a difference of two on machines of several nodes. Beside it (cached) the speed with so few keys that
// they stay in the caches: where that is lower than memory's, computing is what takes the time.
//
//   bench-lazy-attn [--threads N] [--keys N] [--steps N] [--only TEXT] [--json FILE]

#include "qcache-op.h"
#include "qcache.h"

#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr int    N_BLOCK_TOKENS = 32;
constexpr int    N_TEXT_PERIOD  = 20;          // every so many blocks one is text: 95 % of the tokens are visual
constexpr int    CACHED_KEYS    = 192;         // so few that they stay in the caches
constexpr size_t COLD_BYTES     = 256u << 20;  // of all copies together, many times the last-level cache
constexpr double NMSE_MAX       = 1e-8;        // float against double

using clock_type = std::chrono::steady_clock;

enum class mode { off, global, visual };

const char * mode_name(mode m) {
    return m == mode::off ? "off" : m == mode::global ? "global" : "visual";
}

struct shape {
    int head_dim;
    int n_head;
    int n_head_kv;
};

// the same function on all threads at once
class team {
  public:
    explicit team(int n) : n(n) {
        for (int i = 1; i < n; i++) {
            threads.emplace_back([this, i] { work(i); });
        }
    }
    ~team() {
        stop = true;
        turn++;
        for (auto & thread : threads) {
            thread.join();
        }
    }
    // seconds until the last thread is done
    double run(const std::function<void(int, int)> & fn) {
        job              = &fn;
        n_left           = n - 1;
        const auto start = clock_type::now();
        turn++;
        fn(0, n);
        while (n_left > 0) {
        }
        return std::chrono::duration<double>(clock_type::now() - start).count();
    }
    const int n;

  private:
    void work(int i) {
        for (int seen = 0;;) {
            while (turn == seen) {
                std::this_thread::yield();
            }
            seen = turn;
            if (stop) {
                return;
            }
            (*job)(i, n);
            n_left--;
        }
    }
    std::vector<std::thread>                threads;
    const std::function<void(int, int)> *   job = nullptr;
    std::atomic<int>                        turn{ 0 }, n_left{ 0 };
    std::atomic<bool>                       stop{ false };
};

// bytes in large pages, as the cache's slabs are
class huge_memory {
  public:
    huge_memory() = default;
    explicit huge_memory(size_t size) : n_bytes(size), bytes(new uint8_t[size + PAGE_BYTES]) {
        start = (uint8_t *) (((uintptr_t) bytes.get() + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES);
#if defined(__linux__)
        madvise(start, size, MADV_HUGEPAGE);
#endif
    }
    uint8_t * data() { return start; }
    size_t    size() const { return n_bytes; }

  private:
    static constexpr size_t    PAGE_BYTES = (size_t) 2 << 20;
    size_t                     n_bytes    = 0;
    std::unique_ptr<uint8_t[]> bytes; // not touched before the advice
    uint8_t *                  start = nullptr;
};

// bytes per second that a loop of plain loads reads, the best of several passes
double read_bandwidth(team & threads, const uint8_t * memory, size_t size) {
    std::vector<uint64_t> sums(threads.n * 8);
    double                best = 0.0;
    for (int pass = 0; pass < 4; pass++) {
        const double seconds = threads.run([&](int ith, int nth) {
            uint64_t sum = 0, x;
            for (size_t i = size / nth * ith; i + sizeof(x) <= size / nth * (ith + 1); i += 64) { // a cache line each
                std::memcpy(&x, memory + i, sizeof(x));
                sum += x;
            }
            sums[ith * 8] += sum;
        });
        best = std::max(best, (double) size / seconds);
    }
    return sums[0] > 0 ? best : 0.0;
}

double median(std::vector<double> x) {
    std::sort(x.begin(), x.end());
    return x[x.size() / 2];
}

// a batch of one text row for each sequence, at the end of n_keys keys, in one or more copies of the cache
struct batch {
    shape                                       s;
    int                                         type, n_seqs, n_keys;
    size_t                                      k_bytes, v_bytes, block_bytes;
    huge_memory                                 memory; // of all blocks
    std::vector<std::vector<qcache_attn_block>> blocks; // by copy and sequence
    std::vector<qcache_attn_seq>                seqs;
    std::vector<qcache_attn_row>                rows;
    std::vector<qcache_attn_step>               steps; // by copy
    std::vector<float>                          q_own, q_leader, scores;

    batch(shape s, int type, int n_seqs, int n_keys, size_t bytes_min) : s(s), type(type), n_seqs(n_seqs), n_keys(n_keys) {
        std::mt19937                    rng(1);
        std::normal_distribution<float> normal;

        k_bytes     = qcache_kv_row_bytes(type, s.head_dim) * N_BLOCK_TOKENS * s.n_head_kv;
        v_bytes     = k_bytes;
        block_bytes = 2 * k_bytes + v_bytes; // the leader's K, the own K, the own V

        // a few random blocks, repeated
        std::vector<std::vector<uint8_t>> patterns(4, std::vector<uint8_t>(block_bytes));
        const int                         n_padded = (s.head_dim + 31) / 32 * 32;
        for (auto & pattern : patterns) {
            for (size_t at = 0; at < block_bytes; at += qcache_kv_row_bytes(type, s.head_dim)) {
                float x[256] = {};
                for (int d = 0; d < s.head_dim; d++) {
                    x[d] = normal(rng);
                }
                if (type == GGML_TYPE_F16) {
                    ggml_fp32_to_fp16_row(x, (ggml_fp16_t *) &pattern[at], s.head_dim);
                } else {
                    ggml_get_type_traits((ggml_type) type)->from_float_ref(x, &pattern[at], n_padded);
                }
            }
        }
        const int    n_blocks = (n_keys + N_BLOCK_TOKENS - 1) / N_BLOCK_TOKENS;
        const size_t touched  = (size_t) n_seqs * n_blocks * v_bytes; // what every mode reads at least
        const int    n_copies = (int) std::max((bytes_min + touched - 1) / touched, (size_t) 1);
        memory = huge_memory((size_t) n_copies * n_seqs * n_blocks * block_bytes);
        for (int i = 0; i < n_copies * n_seqs; i++) {
            blocks.emplace_back();
            for (int ib = 0; ib < n_blocks; ib++) {
                uint8_t *  data  = memory.data() + ((size_t) i * n_blocks + ib) * block_bytes;
                const auto & pattern = patterns[(i + ib) % patterns.size()];
                std::copy(pattern.begin(), pattern.end(), data);
                const int first = ib * N_BLOCK_TOKENS;
                // the row itself is text, so the last block is
                const bool text = ib % N_TEXT_PERIOD == 0 || ib == n_blocks - 1;
                blocks.back().push_back({ data, first, std::min(N_BLOCK_TOKENS, n_keys - first),
                                          (int8_t) (text ? QCACHE_MODALITY_TEXT : QCACHE_MODALITY_VISUAL), nullptr });
            }
        }
        for (const auto & b : blocks) {
            seqs.push_back({ b.data(), (int32_t) b.size() });
        }
        for (int i = 0; i < n_seqs; i++) {
            rows.push_back({ i, n_keys - 1, i, n_blocks - 1, QCACHE_MODALITY_TEXT });
        }
        scores.resize((size_t) n_seqs * s.n_head * n_keys);
        for (int copy = 0; copy < n_copies; copy++) {
            steps.push_back({ seqs.data() + (size_t) copy * n_seqs, rows.data(), n_seqs, n_seqs, scores.data(), n_keys, nullptr });
        }
        for (auto * q : { &q_own, &q_leader }) {
            q->resize((size_t) n_seqs * s.n_head * s.head_dim);
            for (float & x : *q) {
                x = normal(rng);
            }
        }
    }

    qcache_attn_params params(mode m, int copy) const {
        qcache_attn_params p = {};
        p.head_dim           = s.head_dim;
        p.n_head             = s.n_head;
        p.n_head_kv          = s.n_head_kv;
        p.n_block_tokens     = N_BLOCK_TOKENS;
        p.type_k             = type;
        p.type_v             = type;
        p.scale              = 1.0f / std::sqrt((float) s.head_dim);
        p.score_op           = m == mode::off ? QCACHE_SCORE_NONE : QCACHE_SCORE_READ;
        p.step               = &steps[copy];
        for (int row = 0; row < 2; row++) {
            p.v_offset[row] = 2 * k_bytes;
            for (int key = 0; key < 2; key++) {
                const bool own       = m == mode::off || (m == mode::visual && row == QCACHE_MODALITY_TEXT && key == QCACHE_MODALITY_TEXT);
                p.q_source[row][key] = own ? QCACHE_Q_OWN : QCACHE_Q_LEADER;
                p.k_offset[row][key] = own ? k_bytes : 0;
            }
        }
        return p;
    }

    // bytes that a step reads
    size_t bytes(mode m) const {
        size_t n_computed = 0;
        for (const auto & block : blocks[0]) {
            n_computed += m == mode::off || (m == mode::visual && block.modality == QCACHE_MODALITY_TEXT) ? block.n : 0;
        }
        const size_t row = qcache_kv_row_bytes(type, s.head_dim) * s.n_head_kv;
        return n_seqs * (n_computed * row + (size_t) n_keys * row + (m == mode::off ? 0 : n_keys - n_computed) * s.n_head * sizeof(float));
    }

    // the leader's logits, left in the score cache by the scalar kernel
    void fill_scores() {
        qcache_attn_params p = params(mode::global, 0);
        p.score_op           = QCACHE_SCORE_WRITE;
        std::vector<float> out(q_own.size());
        qcache_attn_kernel_scalar()->fn(p, nullptr, q_leader.data(), out.data(), nullptr, 0, 1);
    }
};

double nmse_of_best_kernel(shape s, int type, int n_seqs, mode m, team & threads) {
    batch b(s, type, n_seqs, 3 * N_TEXT_PERIOD * N_BLOCK_TOKENS / 5 + 7, 0);
    if (m != mode::off) {
        b.fill_scores();
    }
    const qcache_attn_params p = b.params(m, 0);
    std::vector<float>       expected(b.q_own.size()), got(b.q_own.size());
    std::vector<uint8_t>     wdata(qcache_attn_scratch_bytes(p) * threads.n);
    qcache_attn_scratch_init(p, wdata.data(), threads.n);
    qcache_attn_kernel_scalar()->fn(p, b.q_own.data(), b.q_leader.data(), expected.data(), nullptr, 0, 1);
    threads.run([&](int ith, int nth) {
        qcache_attn_kernel_best()->fn(p, b.q_own.data(), b.q_leader.data(), got.data(), wdata.data(), ith, nth);
    });
    double error = 0.0, norm = 0.0;
    for (size_t i = 0; i < got.size(); i++) {
        error += ((double) got[i] - expected[i]) * ((double) got[i] - expected[i]);
        norm += (double) expected[i] * expected[i];
    }
    return error / norm;
}

double seconds_per_step(batch & b, mode m, team & threads, int n_steps) {
    std::vector<float>              out(b.q_own.size());
    std::vector<uint8_t>            wdata(qcache_attn_scratch_bytes(b.params(m, 0)) * threads.n);
    qcache_attn_scratch_init(b.params(m, 0), wdata.data(), threads.n);
    std::vector<double>             seconds;
    std::vector<qcache_attn_params> params;
    for (int copy = 0; copy < (int) b.steps.size(); copy++) {
        params.push_back(b.params(m, copy));
    }
    for (int i = 0; i < n_steps + 3; i++) {
        const qcache_attn_params & p = params[i % params.size()];
        const double               t = threads.run([&](int ith, int nth) {
            qcache_attn_kernel_best()->fn(p, b.q_own.data(), b.q_leader.data(), out.data(), wdata.data(), ith, nth);
        });
        if (i >= 3) {
            seconds.push_back(t);
        }
    }
    return median(seconds);
}

int usage(const char * program) {
    fprintf(stderr, "usage: %s [--threads N] [--keys N] [--steps N] [--only TEXT] [--json FILE]\n", program);
    return 2;
}

} // namespace

int main(int argc, char ** argv) {
    int          n_threads = (int) std::max(1u, std::thread::hardware_concurrency());
    int          n_keys    = 3072;
    int          n_steps   = 20;
    const char * json_path = nullptr;
    std::string  only; // rows that start so, as "d128 32/4 q8_0"
    for (int i = 1; i < argc; i += 2) {
        const std::string name = argv[i];
        if (i + 1 == argc) {
            return usage(argv[0]);
        }
        int * number = name == "--threads" ? &n_threads : name == "--keys" ? &n_keys : name == "--steps" ? &n_steps : nullptr;
        if (number != nullptr) {
            *number = atoi(argv[i + 1]);
        } else if (name == "--only") {
            only = argv[i + 1];
        } else if (name == "--json") {
            json_path = argv[i + 1];
        } else {
            return usage(argv[0]);
        }
    }
    if (n_threads < 1 || n_keys < 1 || n_steps < 1) {
        return usage(argv[0]);
    }

    team threads(n_threads);
    printf("%s, %d threads, %d keys\n", qcache_attn_kernel_best()->name, n_threads, n_keys);
    printf("%-14s %-5s %4s %-7s %9s %7s %7s %6s %7s %9s\n", "shape", "type", "seqs", "mode", "ms", "GB/s", "memory", "share", "cached", "NMSE");
    std::string json = "{\"benchmark\": \"lazy_attn\", \"kernel\": \"" + std::string(qcache_attn_kernel_best()->name) +
                       "\", \"threads\": " + std::to_string(n_threads) + ", \"keys\": " + std::to_string(n_keys) +
                       ", \"rows\": [";
    const char * separator = "\n";
    const shape  shapes[]  = { { 128, 32, 32 }, { 128, 32, 8 }, { 128, 32, 4 }, { 80, 32, 32 }, { 128, 28, 4 } };
    for (const shape & s : shapes) {
        for (const int type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            for (const int n_seqs : { 1, 8 }) {
                for (const mode m : { mode::off, mode::global, mode::visual }) {
                    const std::string name = "d" + std::to_string(s.head_dim) + " " + std::to_string(s.n_head) + "/" + std::to_string(s.n_head_kv);
                    const std::string row_name = name + " " + ggml_type_name((ggml_type) type) + " " + std::to_string(n_seqs) + " " + mode_name(m);
                    if (row_name.rfind(only, 0) != 0) {
                        continue;
                    }
                    const double nmse = nmse_of_best_kernel(s, type, n_seqs, m, threads);
                    if (!(nmse <= NMSE_MAX)) {
                        fprintf(stderr, "head_dim %d, %d heads, %d KV heads, %s, %d sequences, %s: NMSE %.2e, at most %.0e\n", s.head_dim,
                                s.n_head, s.n_head_kv, ggml_type_name((ggml_type) type), n_seqs, mode_name(m), nmse, NMSE_MAX);
                        return 1;
                    }
                    batch        b(s, type, n_seqs, n_keys, COLD_BYTES);
                    const double peak  = read_bandwidth(threads, b.memory.data(), b.memory.size());
                    const double t     = seconds_per_step(b, m, threads, n_steps);
                    const double rate  = (double) b.bytes(m) / t;
                    // with a few keys, again and again: what computing alone would let through
                    batch        few(s, type, 1, CACHED_KEYS, 0);
                    const double cached = (double) few.bytes(m) / seconds_per_step(few, m, threads, 20 * n_steps);
                    printf("%-14s %-5s %4d %-7s %9.3f %7.1f %7.1f %5.0f%% %7.1f %9.1e\n", name.c_str(), ggml_type_name((ggml_type) type), n_seqs,
                           mode_name(m), 1e3 * t, rate / 1e9, peak / 1e9, 100 * rate / peak, cached / 1e9, nmse);
                    fflush(stdout);
                    char row[512];
                    snprintf(row, sizeof(row),
                             "%s{\"head_dim\": %d, \"n_head\": %d, \"n_head_kv\": %d, \"type\": \"%s\", \"n_seq\": %d, \"mode\": \"%s\", "
                             "\"ms\": %.4f, \"bytes\": %zu, \"gbps\": %.2f, \"memory_gbps\": %.2f, \"bandwidth_share\": %.4f, \"cached_gbps\": %.2f, \"nmse\": %.2e}",
                             separator, s.head_dim, s.n_head, s.n_head_kv, ggml_type_name((ggml_type) type), n_seqs, mode_name(m), 1e3 * t,
                             b.bytes(m), rate / 1e9, peak / 1e9, rate / peak, cached / 1e9, nmse);
                    json += row;
                    separator = ",\n";
                }
            }
        }
    }
    if (json_path != nullptr) {
        FILE * file = fopen(json_path, "w");
        if (file == nullptr || fputs((json + "\n]}\n").c_str(), file) < 0 || fclose(file) != 0) {
            perror(json_path);
            return 1;
        }
    }
    return 0;
}
