// qcache-cache.cpp: block memory and its state
//
// A block is one piece of memory for all layers of a device, so that a kernel needs one pointer per block and one offset per
// layer.

#include "qcache-cache.h"

#include <algorithm>
#include <cstring>

static size_t align_up(size_t size) {
    const size_t alignment = 64; // a cache line, and no vector load crosses two layers
    return (size + alignment - 1) / alignment * alignment;
}

qcache_layout::qcache_layout(const qcache_hparams & hparams, const std::vector<int32_t> & leader, enum qcache_lazy_mode mode,
                             int32_t first, int32_t end, int32_t n_block_tokens, int32_t type_k, int32_t type_v) :
    n_block_tokens(n_block_tokens), type_k(type_k), type_v(type_v) {
    const size_t n_rows  = (size_t) n_block_tokens * hparams.n_head_kv;
    const size_t k_bytes = align_up(n_rows * qcache_kv_row_bytes(type_k, hparams.head_dim));
    const size_t v_bytes = align_up(n_rows * qcache_kv_row_bytes(type_v, hparams.head_dim));
    for (int modality = 0; modality < 2; modality++) {
        size_t offset = 0;
        for (int32_t il = 0; il < hparams.n_layer; il++) {
            const bool keeps_v = il >= first && il < end && leader[il] != QCACHE_LEADER_NONE;
            const bool keeps_k = keeps_v && (leader[il] == il || (mode == QCACHE_LAZY_MODE_VISUAL && modality == QCACHE_MODALITY_TEXT));
            k_offset[modality].push_back(keeps_k ? offset : none);
            offset += keeps_k ? k_bytes : 0;
            v_offset[modality].push_back(keeps_v ? offset : none);
            offset += keeps_v ? v_bytes : 0;
        }
        block_bytes[modality] = offset;
    }
    full_block_bytes = (k_bytes + v_bytes) * (end - first);
}

static size_t sum_block_bytes(const std::vector<qcache_cache_part> & parts, int modality) {
    size_t sum = 0;
    for (const auto & part : parts) {
        sum += part.layout.block_bytes[modality];
    }
    return sum;
}

qcache_cache::qcache_cache(std::vector<qcache_cache_part> given, int32_t n_seq_max, size_t bytes_max, std::vector<int32_t> fingerprint) :
    parts(std::move(given)), block_bytes{ sum_block_bytes(parts, 0), sum_block_bytes(parts, 1) },
    mgr(n_seq_max, parts[0].layout.n_block_tokens, block_bytes, bytes_max), fingerprint(std::move(fingerprint)) {
    for (const auto & part : parts) {
        for (const size_t n_bytes : part.layout.block_bytes) {
            pools.emplace_back(part.buft, n_bytes);
        }
    }
}

// a part of a block as a tensor of bytes, which is how ggml reads and writes device memory
struct block_bytes_tensor {
    ggml_context_ptr ctx;
    ggml_tensor *    tensor;

    block_bytes_tensor(const qcache_slabs & slabs, const qcache_slabs::place & place, size_t size) :
        ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true })) {
        tensor = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, (int64_t) size);
        ggml_backend_tensor_alloc(slabs.buffer(place), tensor, slabs.data(place));
    }
};

bool qcache_cache::allocate(block_memory & to, int8_t modality) {
    to.modality = modality;
    for (size_t i = 0; i < parts.size(); i++) {
        qcache_slabs::place place;
        if (!slabs(i, modality).take(place)) {
            release(to);
            return false;
        }
        to.places.push_back(place);
        if (const size_t size = parts[i].layout.block_bytes[modality]; size > 0) {
            ggml_backend_tensor_memset(block_bytes_tensor(slabs(i, modality), place, size).tensor, 0, 0, size);
        }
    }
    return true;
}

void qcache_cache::release(block_memory & from) {
    for (size_t i = 0; i < from.places.size(); i++) {
        slabs(i, from.modality).give_back(from.places[i]);
    }
    from.places.clear();
}

bool qcache_cache::sync() {
    bool ok = true;
    memory.resize(std::max((size_t) mgr.n_ids(), memory.size()));
    const auto changed = mgr.take_changed();
    for (const int32_t id : changed) {
        // an id freed and taken again may be of the other modality
        if (id >= mgr.n_ids() || !mgr.used(id) || memory[id].modality != mgr.modality(id)) {
            release(memory[id]);
        }
    }
    for (const int32_t id : changed) {
        if (ok && id < mgr.n_ids() && mgr.used(id) && memory[id].places.empty()) {
            ok = allocate(memory[id], mgr.modality(id));
        }
    }
    if (ok) {
        for (const auto & copy : mgr.take_copies()) {
            for (size_t i = 0; i < parts.size(); i++) {
                const int8_t modality = mgr.modality(copy.src);
                const size_t size     = parts[i].layout.block_bytes[modality];
                if (size > 0) {
                    const auto &       pool = slabs(i, modality);
                    block_bytes_tensor src(pool, memory[copy.src].places[i], size), dst(pool, memory[copy.dst].places[i], size);
                    ggml_backend_tensor_copy(src.tensor, dst.tensor);
                }
            }
        }
    }
    return ok;
}

qcache_attn_block qcache_cache::view(const qcache_seq_block & block, size_t part) const {
    const auto & pool  = slabs(part, block.modality);
    const auto & place = memory[block.id].places[part];
    return { pool.data(place), block.first, block.n, block.modality, pool.buffer(place) };
}

void qcache_cache::read(int32_t id, size_t part, size_t offset, void * to, size_t size) const {
    block_bytes_tensor from(slabs(part, memory[id].modality), memory[id].places[part], offset + size);
    ggml_backend_tensor_get(from.tensor, to, offset, size);
}

struct qcache_kv_usage qcache_cache::usage() const {
    struct qcache_kv_usage u = {};

    u.n_blocks_text      = mgr.n_blocks(QCACHE_MODALITY_TEXT);
    u.n_blocks_visual    = mgr.n_blocks(QCACHE_MODALITY_VISUAL);
    u.n_blocks           = u.n_blocks_text + u.n_blocks_visual;
    u.bytes              = mgr.bytes();
    for (const auto & part : parts) {
        u.bytes_block_full += part.layout.full_block_bytes;
    }
    u.bytes_if_full      = u.n_blocks * u.bytes_block_full;
    u.bytes_max          = mgr.bytes_limit();
    u.bytes_block_text   = block_bytes[QCACHE_MODALITY_TEXT];
    u.bytes_block_visual = block_bytes[QCACHE_MODALITY_VISUAL];
    u.n_block_tokens     = parts[0].layout.n_block_tokens;
    for (int32_t s = 0; s < mgr.n_seqs(); s++) {
        for (const auto & block : mgr.seq(s)) {
            (block.modality == QCACHE_MODALITY_VISUAL ? u.n_tokens_visual : u.n_tokens_text) += block.n;
        }
    }
    return u;
}

//
// state: magic, fingerprint, blocks (modality), sequences (block list), then the bytes of every block, then a checksum of
// all that: a flipped bit in K or V, or in a token count, would load and give wrong text
//

static const uint32_t STATE_MAGIC   = 0x53514751; // "QGQS"
static const uint32_t STATE_VERSION = 2;

// FNV-1a over 32-bit words, which everything in a state is made of
static uint64_t state_checksum(uint64_t sum, const void * data, size_t size) {
    for (size_t i = 0; i + sizeof(uint32_t) <= size; i += sizeof(uint32_t)) {
        uint32_t word;
        memcpy(&word, (const uint8_t *) data + i, sizeof(word));
        sum = (sum ^ word) * 0x100000001b3;
    }
    return sum;
}

static const uint64_t STATE_CHECKSUM_START = 0xcbf29ce484222325;

size_t qcache_cache::state_size() const {
    size_t n_values = 3 + fingerprint.size() + 2 + mgr.n_blocks(0) + mgr.n_blocks(1);
    for (int32_t s = 0; s < mgr.n_seqs(); s++) {
        n_values += 1 + 2 * mgr.seq(s).size();
    }
    return n_values * sizeof(int32_t) + mgr.bytes() + sizeof(uint64_t);
}

bool qcache_cache::write_state(const sink & unchecked_out) const {
    uint64_t   sum = STATE_CHECKSUM_START;
    const auto out = [&](const void * data, size_t size) {
        sum = state_checksum(sum, data, size);
        return unchecked_out(data, size);
    };
    const auto put = [&](int32_t value) { return out(&value, sizeof(value)); };

    // block ids are renumbered without the free ones
    std::vector<int32_t> ids, number(mgr.n_ids(), -1);
    for (int32_t id = 0; id < mgr.n_ids(); id++) {
        if (mgr.used(id)) {
            number[id] = (int32_t) ids.size();
            ids.push_back(id);
        }
    }
    bool ok = put((int32_t) STATE_MAGIC) && put((int32_t) STATE_VERSION) && put((int32_t) fingerprint.size());
    for (const int32_t value : fingerprint) {
        ok = ok && put(value);
    }
    ok = ok && put(mgr.n_seqs()) && put((int32_t) ids.size());
    for (const int32_t id : ids) {
        ok = ok && put(mgr.modality(id));
    }
    for (int32_t s = 0; s < mgr.n_seqs() && ok; s++) {
        ok = put((int32_t) mgr.seq(s).size());
        for (const auto & block : mgr.seq(s)) {
            ok = ok && put(number[block.id]) && put(block.n);
        }
    }
    std::vector<uint8_t> staging; // for memory that the host cannot read
    for (const int32_t id : ids) {
        for (size_t i = 0; i < parts.size(); i++) {
            const size_t size = parts[i].layout.block_bytes[mgr.modality(id)];
            if (size == 0) {
                continue; // layers without attention alone
            }
            if (ggml_backend_buft_is_host(parts[i].buft)) {
                ok = ok && out(slabs(i, mgr.modality(id)).data(memory[id].places[i]), size);
                continue;
            }
            staging.resize(size);
            read(id, i, 0, staging.data(), size);
            ok = ok && out(staging.data(), size);
        }
    }
    return ok && unchecked_out(&sum, sizeof(sum));
}

enum qcache_status qcache_cache::read_state(const uint8_t * data, size_t size, int32_t n_ctx) {
    size_t     pos     = 0;
    const auto damaged = [&](const char * what, long long value) {
        return qcache_fail(QCACHE_STATUS_INVALID_STATE, "the saved state of %zu bytes is damaged at byte %zu: %s %lld", size, pos, what, value);
    };
    const auto get = [&](int32_t & value) {
        if (size - pos < sizeof(value)) {
            return false;
        }
        memcpy(&value, data + pos, sizeof(value));
        pos += sizeof(value);
        return true;
    };
    int32_t magic = 0, version = 0, n_fingerprint = 0;
    if (!get(magic) || (uint32_t) magic != STATE_MAGIC) {
        return damaged("it does not start as a state does but with", magic);
    }
    if (!get(version) || version != (int32_t) STATE_VERSION) {
        return damaged("unknown version", version);
    }
    uint64_t sum = 0;
    if (size < pos + sizeof(sum) || size % sizeof(uint32_t) != 0) {
        return damaged("it ends early, after bytes", (long long) size);
    }
    size -= sizeof(sum);
    memcpy(&sum, data + size, sizeof(sum));
    if (const uint64_t actual = state_checksum(STATE_CHECKSUM_START, data, size); actual != sum) {
        return qcache_fail(QCACHE_STATUS_INVALID_STATE, "the saved state of %zu bytes is damaged: its checksum is %016llx, expected %016llx",
                           size + sizeof(sum), (unsigned long long) actual, (unsigned long long) sum);
    }
    if (!get(n_fingerprint)) {
        return damaged("it ends early, fingerprint", n_fingerprint);
    }
    if (n_fingerprint != (int32_t) fingerprint.size()) {
        return qcache_fail(QCACHE_STATUS_INVALID_STATE, "the state was saved with another number of layers (%d fingerprint values, expected %zu)",
                           n_fingerprint, fingerprint.size());
    }
    for (size_t i = 0; i < fingerprint.size(); i++) {
        int32_t value = 0;
        if (!get(value)) {
            return damaged("it ends early, fingerprint value", (long long) i);
        }
        if (value != fingerprint[i]) {
            static const char * names[] = { "n_layer", "n_embd",  "n_head",         "n_head_kv", "head_dim",
                                            "type_k",  "type_v", "n_block_tokens", "lazy_mode", "layer_first",
                                            "n_layers" };
            const size_t        n_names = sizeof(names) / sizeof(names[0]);
            return qcache_fail(QCACHE_STATUS_INVALID_STATE, "the state was saved with %s %d, this context has %d",
                               i < n_names ? names[i] : ("leader of layer " + std::to_string(i - n_names)).c_str(), value, fingerprint[i]);
        }
    }
    int32_t n_seqs = 0, n_blocks = 0;
    if (!get(n_seqs) || !get(n_blocks) || n_seqs < 0 || n_blocks < 0 || (size_t) n_seqs > size || (size_t) n_blocks > size) {
        return damaged("number of sequences or blocks", n_seqs < 0 || (size_t) n_seqs > size ? n_seqs : n_blocks);
    }
    std::vector<int8_t> modality(n_blocks);
    int32_t             counts[2] = { 0, 0 };
    size_t              bytes     = 0;
    for (auto & m : modality) {
        int32_t value = 0;
        if (!get(value) || value < 0 || value > 1) {
            return damaged("modality", value);
        }
        m = (int8_t) value;
        counts[value]++;
        bytes += block_bytes[value];
    }
    std::vector<std::vector<qcache_seq_block>> seqs(std::max(n_seqs, mgr.n_seqs()));
    std::vector<bool>                          referenced(n_blocks);
    for (int32_t s = 0; s < n_seqs; s++) {
        int32_t n = 0, first = 0;
        if (!get(n) || n < 0 || n > n_blocks) {
            return damaged("blocks of a sequence", n);
        }
        if (n > 0 && s >= mgr.n_seqs()) {
            return qcache_fail(QCACHE_STATUS_INVALID_STATE, "the state holds sequence %d, this context has n_seq_max %d", s, mgr.n_seqs());
        }
        for (int32_t i = 0; i < n; i++) {
            int32_t id = 0, n_tokens = 0;
            if (!get(id) || !get(n_tokens) || id < 0 || id >= n_blocks || n_tokens < 1 || n_tokens > parts[0].layout.n_block_tokens) {
                return damaged("block", id);
            }
            seqs[s].push_back({ id, first, n_tokens, modality[id] });
            referenced[id] = true;
            first += n_tokens;
        }
        if (first > n_ctx) {
            return qcache_fail(QCACHE_STATUS_INVALID_STATE, "the state holds %d tokens in sequence %d, n_ctx is %d", first, s, n_ctx);
        }
    }
    seqs.resize(mgr.n_seqs());
    if (std::find(referenced.begin(), referenced.end(), false) != referenced.end()) {
        return damaged("a block belongs to no sequence, blocks", n_blocks);
    }
    if (size - pos != bytes) {
        return damaged("bytes of blocks that follow", (long long) (size - pos));
    }
    if (!mgr.fits(counts[0], counts[1])) {
        return qcache_fail(QCACHE_STATUS_NO_BLOCKS, "the state needs %zu bytes of KV, kv_bytes_max is %zu", bytes, mgr.bytes_limit());
    }
    // new memory first: what is held now goes only when nothing can fail any more
    std::vector<block_memory> fresh(n_blocks);
    for (int32_t id = 0; id < n_blocks; id++) {
        if (!allocate(fresh[id], modality[id])) {
            for (auto & block : fresh) {
                release(block);
            }
            return qcache_fail(QCACHE_STATUS_OUT_OF_MEMORY, "cannot allocate %zu bytes of KV for a saved state", bytes);
        }
        for (size_t i = 0; i < parts.size(); i++) {
            const size_t part_bytes = parts[i].layout.block_bytes[modality[id]];
            if (part_bytes > 0) {
                block_bytes_tensor to(slabs(i, modality[id]), fresh[id].places[i], part_bytes);
                ggml_backend_tensor_set(to.tensor, data + pos, 0, part_bytes);
            }
            pos += part_bytes;
        }
    }
    mgr.restore(seqs, modality);
    for (auto & block : memory) {
        release(block);
    }
    memory = std::move(fresh);
    return QCACHE_STATUS_SUCCESS;
}
