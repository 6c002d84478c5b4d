// qcache-blocks.h: which block of the paged KV holds which token. No tensors and no memory here: a block is a number.
//
// A block holds up to n_block_tokens tokens of one modality. Blocks are reference-counted and shared between sequences;
// a sequence that appends to a shared, partly filled block gets a copy of it first.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

struct qcache_seq_block {
    int32_t id;
    int32_t first;    // position of its first token
    int32_t n;        // tokens of it that belong to the sequence
    int8_t  modality; // enum qcache_modality
};

// the first n tokens of block src are to be copied to dst before anything is written to dst
struct qcache_block_copy {
    int32_t src;
    int32_t dst;
};

class qcache_blocks {
  public:
    // block_bytes: bytes of a block by modality; bytes_max 0: no limit
    qcache_blocks(int32_t n_seq_max, int32_t n_block_tokens, const size_t block_bytes[2], size_t bytes_max);

    // Appends happen between begin and commit; rollback gives back what begin found.
    void begin();
    void commit();
    void rollback();

    // Index in seq(seq_id) of the block that holds the new last token, or -1 when a new block would pass bytes_max.
    int32_t append(int32_t seq_id, int8_t modality);

    void truncate(int32_t seq_id, int32_t n_tokens);             // keeps the first n_tokens
    void share(int32_t src, int32_t dst, int32_t n_tokens);      // dst becomes the first n_tokens of src

    // Replaces everything, for a saved state; nothing counts as changed. Every id in seqs is in 0 .. modality.size()-1
    // and every one of those is in seqs.
    void restore(const std::vector<std::vector<qcache_seq_block>> & seqs, const std::vector<int8_t> & modality);

    const std::vector<qcache_seq_block> & seq(int32_t seq_id) const { return seqs[seq_id]; }

    int32_t n_seqs() const { return (int32_t) seqs.size(); }
    int32_t n_ids() const { return (int32_t) infos.size(); }
    int32_t len(int32_t seq_id) const;
    bool    used(int32_t id) const { return infos[id].n_refs > 0; }
    int8_t  modality(int32_t id) const { return infos[id].modality; }
    int32_t n_blocks(int8_t modality) const { return counts[modality]; }
    size_t  bytes() const { return counts[0] * block_bytes[0] + counts[1] * block_bytes[1]; }
    size_t  bytes_limit() const { return bytes_max; }
    bool    fits(int32_t n_text, int32_t n_visual) const; // would that many blocks in all stay under bytes_max?

    // Since the last call: ids whose use changed, and the copies that are due, in order.
    std::vector<int32_t>           take_changed();
    std::vector<qcache_block_copy> take_copies();

  private:
    struct info {
        int32_t n_refs;
        int8_t  modality;
    };
    struct undo {
        int32_t          seq_id;
        int32_t          n_blocks;
        qcache_seq_block last; // valid when n_blocks > 0; its reference is kept until commit if copy-on-write replaced it
    };

    int32_t take(int8_t modality); // -1: over the limit
    void    ref(int32_t id);
    void    unref(int32_t id);

    int32_t                                    n_block_tokens;
    size_t                                     block_bytes[2];
    size_t                                     bytes_max;
    int32_t                                    counts[2] = { 0, 0 };
    std::vector<info>                          infos;
    std::vector<int32_t>                       free_ids;
    std::vector<std::vector<qcache_seq_block>> seqs;
    std::vector<undo>                          undos;
    std::vector<int32_t>                       changed;
    std::vector<qcache_block_copy>             copies;
};
