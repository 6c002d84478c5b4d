// test_blocks.cpp: the block manager against a model of it: every sequence as a plain list of tokens
//
// Each token written gets a unique number; "memory" maps (block, slot) to the number last written there, so any block
// that is shared wrongly, copied late or reused early shows as a wrong number.

#include "check.h"
#include "qcache-blocks.h"

#include <map>
#include <random>
#include <utility>

namespace {

struct model {
    static constexpr int n_seqs = 4, n_block_tokens = 4;

    const size_t  block_bytes[2] = { 100, 60 };
    qcache_blocks blocks;

    std::vector<std::vector<std::pair<int, int8_t>>> expected{ n_seqs }; // number, modality
    std::map<std::pair<int32_t, int32_t>, int>       memory;             // (block, slot) -> number
    int                                              next = 1;

    explicit model(size_t bytes_max) : blocks(n_seqs, n_block_tokens, block_bytes, bytes_max) {}

    void copy() {
        for (const auto & c : blocks.take_copies()) {
            for (int slot = 0; slot < n_block_tokens; slot++) {
                memory[{ c.dst, slot }] = memory[{ c.src, slot }];
            }
        }
    }

    // several tokens as one batch; on failure or on request all is rolled back
    bool append(const std::vector<std::pair<int, int8_t>> & tokens, bool roll_back) {
        const auto before = expected;
        blocks.begin();
        std::vector<std::pair<std::pair<int32_t, int32_t>, int>> writes;
        for (const auto & [seq, modality] : tokens) {
            const int32_t pos   = blocks.len(seq);
            const int32_t index = blocks.append(seq, modality);
            if (index < 0) {
                blocks.rollback();
                expected = before;
                return false;
            }
            const auto & block = blocks.seq(seq)[index];
            CHECK(block.modality == modality);
            CHECK(block.first + block.n == pos + 1);
            writes.push_back({ { block.id, pos - block.first }, next });
            expected[seq].push_back({ next++, modality });
        }
        copy();
        for (const auto & [at, number] : writes) {
            memory[at] = number;
        }
        if (roll_back) {
            blocks.rollback();
            expected = before;
        } else {
            blocks.commit();
        }
        return true;
    }

    void verify() {
        std::map<int32_t, int8_t> used;
        for (int s = 0; s < n_seqs; s++) {
            int32_t pos = 0;
            CHECK(blocks.len(s) == (int32_t) expected[s].size());
            for (const auto & block : blocks.seq(s)) {
                CHECK(block.first == pos);
                CHECK(block.n >= 1 && block.n <= n_block_tokens);
                CHECK(blocks.used(block.id));
                used[block.id] = block.modality;
                for (int32_t slot = 0; slot < block.n; slot++, pos++) {
                    CHECK((memory[{ block.id, slot }]) == expected[s][pos].first);
                    CHECK(block.modality == expected[s][pos].second);
                }
            }
        }
        size_t  bytes = 0;
        int32_t count = 0;
        for (const auto & [id, modality] : used) {
            (void) id;
            bytes += block_bytes[modality];
            count++;
        }
        CHECK(blocks.bytes() == bytes);
        CHECK(blocks.n_blocks(0) + blocks.n_blocks(1) == count);
        CHECK(blocks.bytes_limit() == 0 || bytes <= blocks.bytes_limit());
    }
};

void random_walk(unsigned seed, size_t bytes_max) {
    printf("random walk: seed %u, bytes_max %zu\n", seed, bytes_max);
    std::mt19937 rng(seed);
    const auto   pick = [&](int n) { return (int) (rng() % (unsigned) n); };
    model        m(bytes_max);
    int          n_refused = 0;
    for (int step = 0; step < 4000; step++) {
        switch (pick(6)) {
            case 0:
            case 1:
            case 2: {
                std::vector<std::pair<int, int8_t>> tokens;
                int8_t                              modality = (int8_t) pick(2);
                for (int i = pick(9); i >= 0; i--) {
                    modality = pick(5) == 0 ? (int8_t) pick(2) : modality;
                    tokens.push_back({ pick(model::n_seqs), modality });
                }
                n_refused += !m.append(tokens, pick(4) == 0);
                break;
            }
            case 3: {
                const int s = pick(model::n_seqs), n = pick(m.blocks.len(s) + 2);
                m.blocks.truncate(s, n);
                if (n < (int) m.expected[s].size()) {
                    m.expected[s].resize(n);
                }
                break;
            }
            case 4: {
                const int src = pick(model::n_seqs), dst = pick(model::n_seqs), n = pick(m.blocks.len(src) + 1);
                m.blocks.share(src, dst, n);
                if (src != dst) {
                    m.expected[dst].assign(m.expected[src].begin(), m.expected[src].begin() + n);
                }
                break;
            }
            case 5:
                if (pick(20) == 0) {
                    for (int s = 0; s < model::n_seqs; s++) {
                        m.blocks.truncate(s, 0);
                        m.expected[s].clear();
                    }
                }
                break;
        }
        m.verify();
    }
    CHECK((n_refused > 0) == (bytes_max > 0)); // the limit was met when there is one, and only then
}

void changed_ids() {
    model m(0);
    m.append({ { 0, 0 }, { 0, 1 } }, false);
    CHECK(m.blocks.take_changed().size() == 2);
    CHECK(m.blocks.take_changed().empty());
    m.blocks.truncate(0, 1);
    CHECK(m.blocks.take_changed().size() == 1);
}

} // namespace

int main() {
    for (unsigned seed = 1; seed <= 5; seed++) {
        random_walk(seed, 0);
        random_walk(seed, 1200);
    }
    changed_ids();
    return check_report("test-blocks");
}
