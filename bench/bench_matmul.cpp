// bench_matmul.cpp: products with quantised weights alone, ours against ggml's
//
// Each type and number of columns (rows of activations) runs with the weights as ggml has them, in those of ggml's extra
// buffer types that take them (CPU_REPACK, AMX), and packed by us, in turns. A run goes through several matrices, so many that
// none is still in a processor cache when its turn comes again. The results are compared first. The ratio is to ggml's best.
//
// Types that the kernel (the best of this CPU, or the one given) doesn't multiply are left out.
//
//   bench-matmul [--kernel avx2] [--threads N] [--k N] [--m N] [--steps N] [--types q4_0,q4_K] [--columns 1,8] [--json FILE]

#include "cpu/matmul-kernels.h"
#include "qcache-matmul.h"
#include "qcache-probe.h"

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr size_t COLD_BYTES = 256u << 20; // of all matrices together, many times the last-level cache
constexpr double NMSE_MAX   = 3e-4;       // between two ways to round activations to 8 bits

using clock_type = std::chrono::steady_clock;

std::vector<std::string> split(const std::string & text) {
    std::vector<std::string> parts;
    std::istringstream       in(text);
    for (std::string part; std::getline(in, part, ',');) {
        parts.push_back(part);
    }
    return parts;
}

// products of several matrices with one input, as a graph
class products {
  public:
    // buft NULL: packed by us, for the kernel
    products(ggml_backend_t backend, ggml_backend_buffer_type_t buft, const qcache_matmul_kernel * kernel, ggml_type type, int64_t k, int64_t m, int64_t n, int n_matrices,
             const std::vector<uint8_t> & rows, const std::vector<float> & x) :
        name(buft == nullptr ? "ours" : ggml_backend_buft_name(buft)), n_matrices(n_matrices), backend(backend) {
        weights.reset(ggml_init({ ggml_tensor_overhead() * n_matrices, nullptr, true }));
        rest.reset(ggml_init({ ggml_tensor_overhead() * (2 * n_matrices + 8) + ggml_graph_overhead(), nullptr, true }));
        std::vector<ggml_tensor *> w;
        for (int i = 0; i < n_matrices; i++) {
            w.push_back(ggml_new_tensor_2d(weights.get(), type, k, m));
        }
        of_weights.reset(ggml_backend_alloc_ctx_tensors_from_buft(weights.get(), buft == nullptr ? ggml_backend_cpu_buffer_type() : buft));
        ggml_tensor * input = ggml_new_tensor_2d(rest.get(), GGML_TYPE_F32, k, n);
        ggml_tensor * xq    = buft == nullptr ? qcache_op_quantize(rest.get(), input) : nullptr;
        graph               = ggml_new_graph(rest.get());
        for (ggml_tensor * t : w) {
            if (buft == nullptr) {
                qcache_matmul_make_packed(t, kernel);
                qcache_matmul_set(t, rows.data());
                y = qcache_op_matmul(rest.get(), t, xq, &nodes.emplace_back());
            } else {
                ggml_backend_tensor_set(t, rows.data(), 0, rows.size());
                y = ggml_mul_mat(rest.get(), t, input);
            }
            ggml_build_forward_expand(graph, y);
        }
        of_rest.reset(ggml_backend_alloc_ctx_tensors(rest.get(), backend));
        ggml_backend_tensor_set(input, x.data(), 0, ggml_nbytes(input));
    }

    // seconds of one product
    double run() {
        const auto start = clock_type::now();
        ggml_backend_graph_compute(backend, graph);
        return std::chrono::duration<double>(clock_type::now() - start).count() / n_matrices;
    }

    std::vector<float> result() const {
        std::vector<float> out(ggml_nelements(y));
        ggml_backend_tensor_get(y, out.data(), 0, ggml_nbytes(y));
        return out;
    }

    const std::string   name;
    std::vector<double> seconds;

    double median() {
        std::sort(seconds.begin(), seconds.end());
        return seconds[seconds.size() / 2];
    }

  private:
    const int                      n_matrices;
    const ggml_backend_t           backend;
    ggml_context_ptr               weights, rest;
    ggml_backend_buffer_ptr        of_weights, of_rest;
    std::deque<qcache_matmul_node> nodes;
    ggml_cgraph *                  graph = nullptr;
    ggml_tensor *                  y     = nullptr;
};

double nmse(const std::vector<float> & a, const std::vector<float> & b) {
    double error = 0, power = 0;
    for (size_t i = 0; i < a.size(); i++) {
        error += ((double) a[i] - b[i]) * ((double) a[i] - b[i]);
        power += (double) b[i] * b[i];
    }
    return error / power;
}

int usage(const char * program) {
    fprintf(stderr, "usage: %s [--kernel NAME] [--threads N] [--k N] [--m N] [--steps N] [--types q4_0,q4_K] [--columns 1,8] [--json FILE]\n", program);
    return 2;
}

} // namespace

int main(int argc, char ** argv) {
    int         n_threads = (int) std::max(1u, std::thread::hardware_concurrency());
    int         k = 4096, m = 11008, n_steps = 11;
    std::string types = "q4_0,q4_1,q5_0,q5_1,q8_0,q4_K,q5_K,q6_K", columns = "1,2,4,8,16,512", kernel_name, json_path;
    for (int i = 1; i < argc; i += 2) {
        const std::string name = argv[i];
        if (i + 1 == argc) {
            return usage(argv[0]);
        }
        int *         number = name == "--threads" ? &n_threads : name == "--k" ? &k : name == "--m" ? &m : name == "--steps" ? &n_steps : nullptr;
        std::string * text   = name == "--types" ? &types : name == "--columns" ? &columns : name == "--kernel" ? &kernel_name : name == "--json" ? &json_path : nullptr;
        if (number != nullptr) {
            *number = atoi(argv[i + 1]);
        } else if (text != nullptr) {
            *text = argv[i + 1];
        } else {
            return usage(argv[0]);
        }
    }
    if (n_threads < 1 || k < 256 || k % 256 != 0 || m < 16 || m % 16 != 0 || n_steps < 1) {
        fprintf(stderr, "threads %d, k %d (a multiple of 256), m %d (of 16), steps %d\n", n_threads, k, m, n_steps);
        return usage(argv[0]);
    }
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr); // of every tensor that ggml repacks

    ggml_backend_ptr         backend{ ggml_backend_cpu_init() };
    const ggml_backend_dev_t cpu = ggml_backend_get_device(backend.get());
    ggml_backend_cpu_set_n_threads(backend.get(), n_threads);
    std::vector<ggml_backend_buffer_type_t> bufts = qcache_extra_bufts(cpu);
    bufts.erase(std::remove_if(bufts.begin(), bufts.end(), [](auto buft) { return !qcache_buft_works(buft); }), bufts.end());
    bufts.push_back(ggml_backend_cpu_buffer_type());

    std::mt19937                    random(1);
    std::normal_distribution<float> normal;
    std::vector<float>              values((size_t) k * m);
    for (float & value : values) {
        value = normal(random);
    }
    const qcache_matmul_kernel * kernel = qcache_matmul_kernel_best();
    for (int i = 0; kernel != nullptr && !kernel_name.empty() && kernel_name != kernel->name; i++) {
        kernel = qcache_matmul_kernel_by_index(i);
    }
    if (kernel == nullptr) {
        fprintf(stderr, "this CPU has no kernel %sfor packed weights\n", kernel_name.empty() ? "" : (kernel_name + " ").c_str());
        return 1;
    }
    printf("%s, %d threads, %d x %d\n%-6s %8s %-12s %9s %9s %7s %7s\n", kernel->name, n_threads, k, m, "type", "columns", "weights", "ms", "GFLOP/s", "GB/s", "ratio");
    std::string  json = "{\"benchmark\": \"matmul\", \"kernel\": \"" + std::string(kernel->name) + "\", \"threads\": " + std::to_string(n_threads) + ", \"k\": " + std::to_string(k) +
                       ", \"m\": " + std::to_string(m) + ", \"rows\": [";
    const char * separator = "\n";
    for (const std::string & type_name : split(types)) {
        int type = 0;
        while (type < GGML_TYPE_COUNT && (ggml_type_name((ggml_type) type) == nullptr || type_name != ggml_type_name((ggml_type) type))) {
            type++;
        }
        if (type == GGML_TYPE_COUNT) {
            fprintf(stderr, "there is no type %s\n", type_name.c_str());
            return 1;
        }
        if (!kernel->multiplies(type)) {
            continue;
        }
        std::vector<uint8_t> rows(ggml_row_size((ggml_type) type, k) * m);
        ggml_quantize_chunk((ggml_type) type, values.data(), rows.data(), 0, m, k, nullptr);
        for (const std::string & n_text : split(columns)) {
            const int n = atoi(n_text.c_str());
            if (n < 1) {
                return usage(argv[0]);
            }
            const int          n_matrices = n > 64 ? 1 : (int) (COLD_BYTES / rows.size()) + 1;
            std::vector<float> x((size_t) k * n);
            for (float & value : x) {
                value = normal(random);
            }
            std::vector<std::unique_ptr<products>> all;
            all.emplace_back(new products(backend.get(), nullptr, kernel, (ggml_type) type, k, m, n, n_matrices, rows, x));
            ggml_context_ptr    ctx{ ggml_init({ ggml_tensor_overhead(), nullptr, true }) };
            const ggml_tensor * shape = ggml_new_tensor_2d(ctx.get(), (ggml_type) type, k, m);
            for (auto buft : bufts) {
                if (qcache_supports_matmul(cpu, buft, shape)) {
                    all.emplace_back(new products(backend.get(), buft, nullptr, (ggml_type) type, k, m, n, n_matrices, rows, x));
                }
            }
            for (auto & p : all) {
                p->run();
                if (const double error = nmse(p->result(), all[0]->result()); !(error < NMSE_MAX)) {
                    fprintf(stderr, "%s, %d columns: NMSE between ours and %s is %.2e\n", type_name.c_str(), n, p->name.c_str(), error);
                    return 1;
                }
            }
            for (int step = 0; step < n_steps; step++) {
                for (auto & p : all) {
                    p->seconds.push_back(p->run());
                }
            }
            double best = 1e9;
            for (size_t i = 1; i < all.size(); i++) {
                best = std::min(best, all[i]->median());
            }
            for (auto & p : all) {
                const double t = p->median(), gflops = 2e-9 * k * m * n / t, gbps = 1e-9 * (double) rows.size() / t;
                printf("%-6s %8d %-12s %9.3f %9.1f %7.1f %7.2f\n", type_name.c_str(), n, p->name.c_str(), 1e3 * t, gflops, gbps, best / t);
                fflush(stdout);
                char row[512];
                snprintf(row, sizeof(row),
                         "%s{\"type\": \"%s\", \"columns\": %d, \"weights\": \"%s\", \"ms\": %.4f, \"gflops\": %.1f, \"gbps\": %.2f, \"ratio_best\": %.3f}",
                         separator, type_name.c_str(), n, p->name.c_str(), 1e3 * t, gflops, gbps, best / t);
                json += row;
                separator = ",\n";
            }
        }
    }
    if (!json_path.empty()) {
        FILE * file = fopen(json_path.c_str(), "w");
        if (file == nullptr || fputs((json + "\n]}\n").c_str(), file) < 0 || fclose(file) != 0) {
            perror(json_path.c_str());
            return 1;
        }
    }
    return 0;
}
