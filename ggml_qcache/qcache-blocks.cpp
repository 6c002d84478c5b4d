// qcache-blocks.cpp: the block manager

#include "qcache-blocks.h"

#include <utility>

qcache_blocks::qcache_blocks(int32_t n_seq_max, int32_t n_block_tokens, const size_t block_bytes[2], size_t bytes_max) :
    n_block_tokens(n_block_tokens), block_bytes{ block_bytes[0], block_bytes[1] }, bytes_max(bytes_max), seqs(n_seq_max) {}

int32_t qcache_blocks::len(int32_t seq_id) const {
    const auto & blocks = seqs[seq_id];
    return blocks.empty() ? 0 : blocks.back().first + blocks.back().n;
}

bool qcache_blocks::fits(int32_t n_text, int32_t n_visual) const {
    return bytes_max == 0 || n_text * block_bytes[0] + n_visual * block_bytes[1] <= bytes_max;
}

int32_t qcache_blocks::take(int8_t modality) {
    if (!fits(counts[0] + (modality == 0), counts[1] + (modality == 1))) {
        return -1;
    }
    int32_t id;
    if (free_ids.empty()) {
        id = (int32_t) infos.size();
        infos.push_back({ 0, modality });
    } else {
        id = free_ids.back();
        free_ids.pop_back();
        infos[id] = { 0, modality };
    }
    counts[modality]++;
    changed.push_back(id);
    ref(id);
    return id;
}

void qcache_blocks::ref(int32_t id) {
    infos[id].n_refs++;
}

void qcache_blocks::unref(int32_t id) {
    if (--infos[id].n_refs == 0) {
        counts[infos[id].modality]--;
        free_ids.push_back(id);
        changed.push_back(id);
    }
}

void qcache_blocks::begin() {
    undos.clear();
}

int32_t qcache_blocks::append(int32_t seq_id, int8_t modality) {
    auto & blocks = seqs[seq_id];

    bool first_of_seq = true;
    for (const auto & u : undos) {
        first_of_seq = first_of_seq && u.seq_id != seq_id;
    }
    const bool starts_block = blocks.empty() || blocks.back().modality != modality || blocks.back().n == n_block_tokens;
    const bool is_shared    = !starts_block && infos[blocks.back().id].n_refs > 1;

    int32_t id = -1;
    if (starts_block || is_shared) {
        id = take(modality);
        if (id < 0) {
            return -1;
        }
    }
    if (first_of_seq) {
        undos.push_back({ seq_id, (int32_t) blocks.size(), blocks.empty() ? qcache_seq_block{} : blocks.back() });
    }
    if (starts_block) {
        blocks.push_back({ id, len(seq_id), 0, modality });
    } else if (is_shared) {
        // only the block that begin() found last can be shared: the old reference stays until commit or rollback
        copies.push_back({ blocks.back().id, id });
        blocks.back().id = id;
    }
    blocks.back().n++;
    return (int32_t) blocks.size() - 1;
}

void qcache_blocks::commit() {
    for (const auto & u : undos) {
        if (u.n_blocks > 0 && seqs[u.seq_id][u.n_blocks - 1].id != u.last.id) {
            unref(u.last.id);
        }
    }
    undos.clear();
}

void qcache_blocks::rollback() {
    for (const auto & u : undos) {
        auto & blocks = seqs[u.seq_id];
        while ((int32_t) blocks.size() > u.n_blocks) {
            unref(blocks.back().id);
            blocks.pop_back();
        }
        if (u.n_blocks > 0) {
            if (blocks.back().id != u.last.id) {
                unref(blocks.back().id);
            }
            blocks.back() = u.last;
        }
    }
    undos.clear();
    copies.clear();
}

void qcache_blocks::truncate(int32_t seq_id, int32_t n_tokens) {
    auto & blocks = seqs[seq_id];
    while (!blocks.empty() && blocks.back().first >= n_tokens) {
        unref(blocks.back().id);
        blocks.pop_back();
    }
    if (!blocks.empty() && blocks.back().first + blocks.back().n > n_tokens) {
        blocks.back().n = n_tokens - blocks.back().first;
    }
}

void qcache_blocks::share(int32_t src, int32_t dst, int32_t n_tokens) {
    if (src == dst) {
        return;
    }
    truncate(dst, 0);
    for (const auto & block : seqs[src]) {
        if (block.first >= n_tokens) {
            break;
        }
        seqs[dst].push_back(block);
        ref(block.id);
    }
    truncate(dst, n_tokens);
}

void qcache_blocks::restore(const std::vector<std::vector<qcache_seq_block>> & new_seqs, const std::vector<int8_t> & modality) {
    for (int32_t s = 0; s < n_seqs(); s++) {
        truncate(s, 0);
    }
    free_ids.clear();
    infos.clear();
    for (int32_t id = 0; id < (int32_t) modality.size(); id++) {
        infos.push_back({ 0, modality[id] });
        counts[modality[id]]++;
    }
    changed.clear();
    seqs = new_seqs;
    for (const auto & blocks : seqs) {
        for (const auto & block : blocks) {
            ref(block.id);
        }
    }
}

std::vector<int32_t> qcache_blocks::take_changed() {
    return std::exchange(changed, {});
}

std::vector<qcache_block_copy> qcache_blocks::take_copies() {
    return std::exchange(copies, {});
}
