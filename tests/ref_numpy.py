"""The judge: lazy attention in NumPy float64, straight from the table in PAPER.md (arXiv 2602.01901).

It knows nothing of blocks, types or kernels: dense arrays in, outputs out.
"""

import numpy as np

TEXT, VISUAL = 0, 1


def pair_source(mode: str, row_modality: int, key_modality: int) -> str:
    """Whose query and key give the logit of a pair: the layer's "own" or its "leader"'s."""
    if mode == "off":
        return "own"
    if mode == "global":
        return "leader"
    if mode == "visual":
        return "own" if row_modality == TEXT and key_modality == TEXT else "leader"
    raise ValueError(f"mode {mode!r}, expected off, global or visual")


def attention(q_own, q_leader, k_own, k_leader, v, modality, positions, mode, vis_bias=None, scale=None):
    """Attention of the rows at `positions` of one sequence.

    Args:
        q_own, q_leader: [n_rows, n_head, head_dim]; None where no pair needs it.
        k_own, k_leader: [n_keys, n_head_kv, head_dim]; likewise. Keys that no pair needs may be anything.
        v: [n_keys, n_head_kv, head_dim].
        modality: [n_keys], TEXT or VISUAL; that of a row is modality[position].
        positions: [n_rows]; a row sees keys 0 .. position.
        mode: "off", "global" or "visual".
        vis_bias: [n_head], added to the logits of (text row, visual key) pairs in visual mode.
        scale: of the logits, 1 / sqrt(head_dim) by default.

    Returns:
        out [n_rows, n_head, head_dim] and the scaled logits before the bias [n_rows, n_head, n_keys], NaN where a row
        does not see a key.
    """
    modality = np.asarray(modality)
    n_rows, n_keys = len(positions), len(modality)
    n_head = (q_own if q_own is not None else q_leader).shape[1]
    n_head_kv, head_dim = v.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale

    # query head h uses KV head h // group; per head: [n_head, n_keys, head_dim]
    by_head = lambda x: np.repeat(x.astype(np.float64), n_head // n_head_kv, axis=1).transpose(1, 0, 2)  # noqa: E731
    sources = [(q, by_head(k)) if q is not None else None for q, k in ((q_own, k_own), (q_leader, k_leader))]
    v = by_head(v)

    out = np.zeros((n_rows, n_head, head_dim))
    logits = np.full((n_rows, n_head, n_keys), np.nan)
    for t, position in enumerate(positions):
        n = position + 1
        from_own = np.array([pair_source(mode, modality[position], m) == "own" for m in modality[:n]])
        row = np.empty((n_head, n))
        for source, mask in zip(sources, (from_own, ~from_own)):
            if mask.any():
                q, k = source
                seen = k[:, :n] if mask.all() else k[:, :n][:, mask]
                row[:, mask] = scale * (seen @ q[t].astype(np.float64)[:, :, None])[:, :, 0]
        logits[t, :, :n] = row
        if vis_bias is not None and mode == "visual" and modality[position] == TEXT:
            row = row + np.where(modality[:n] == VISUAL, vis_bias[:, None], 0.0)
        p = np.exp(row - row.max(axis=1, keepdims=True))
        out[t] = ((p / p.sum(axis=1, keepdims=True))[:, None, :] @ v[:, :n])[:, 0]
    return out, logits


def nmse(x, reference) -> float:
    """Mean squared error over mean square of the reference."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(((x - reference) ** 2).sum() / (reference**2).sum())
