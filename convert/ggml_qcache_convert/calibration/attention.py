"""How alike the attention of layers is, and what sharing it costs: from captured scores and V, in NumPy."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]


def softmax(scores: Array) -> Array:
    """Softmax over the last dimension; -inf is 0."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def js_divergence(p: Array, q: Array) -> Array:
    """Jensen-Shannon divergence of distributions over the last dimension, in nats: 0 to ln 2."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    mean = (p + q) / 2
    tiny = np.finfo(np.float64).tiny  # 0 ln 0 is 0

    def kl(a: Array) -> Array:
        return np.sum(a * (np.log(np.maximum(a, tiny)) - np.log(np.maximum(mean, tiny))), -1)

    return (kl(p) + kl(q)) / 2


def shared_scores(leader: Array, own: Array, row_visual: Array, key_visual: Array, mode: str) -> Array:
    """The scores a lazy layer mixes from its leader's and its own (PAPER.md's table).

    Args:
        leader: ``[n_rows, n_head, n_keys]``.
        own: Likewise.
        row_visual: ``[n_rows]`` bool.
        key_visual: ``[n_keys]`` bool.
        mode: ``visual`` or ``global``.
    """
    if mode == "global":
        return leader
    return np.where(row_visual[:, None, None] | key_visual[None, None, :], leader, own)


def sharing_errors(
    scores: Callable[[int], Array],
    v: Callable[[int], Array],
    w_o: Callable[[int], tuple[Array, Array | float]],
    before: Callable[[int], Array],
    row_visual: Array,
    key_visual: Array,
    mode: str,
    n_layer: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Relative squared error of the residual stream after each layer's attention, with each leader's attention and with none.

    Args:
        scores: Gives a layer's ``[n_rows, n_head, n_keys]``, -inf where a row doesn't see a key.
        v: Gives a layer's ``[n_head_kv, n_keys, head_dim]``.
        w_o: Gives a layer's ``[n_embd, n_head * head_dim]`` and its bias ``[n_embd]`` (0 where there is none); or what
            ``length_keeping`` makes of them, ``[n, n_head * head_dim]`` and ``[n]``.
        before: Gives the residual stream before a layer, ``[n_rows, n_embd]``, or the same made of it.
        row_visual: ``[n_rows]`` bool.
        key_visual: ``[n_keys]`` bool.
        mode: ``visual`` or ``global``.
        n_layer: Number of layers.

    Returns:
        ``[n_layer, n_layer]``: ``[j, l]``, j < l, is the mean over rows of ``|W_o (o' - o)|^2 / |x + W_o o + b_o|^2``; 0 elsewhere.
        ``[n_layer]``: the mean over rows of ``|W_o o + b_o|^2 / |x + W_o o + b_o|^2``, what a layer without attention errs.
    """
    errors, dropped = np.zeros((n_layer, n_layer)), np.zeros(n_layer)
    for layer in range(n_layer):
        own, values, (matrix, bias) = scores(layer), v(layer), w_o(layer)
        n_rows, n_head, n_keys = own.shape
        n_group = n_head // len(values)

        def output(weights: Array) -> Array:
            grouped = weights.transpose(1, 0, 2).reshape(len(values), n_group * n_rows, n_keys)
            by_head = (grouped @ values).reshape(n_head, n_rows, -1)
            return by_head.transpose(1, 0, 2).reshape(n_rows, -1) @ matrix.T

        expected = output(softmax(own))
        power = np.maximum(np.sum((before(layer) + expected + bias) ** 2, axis=-1, dtype=np.float64), np.finfo(np.float64).tiny)
        dropped[layer] = np.mean(np.sum((expected + bias) ** 2, axis=-1, dtype=np.float64) / power)
        for leader in range(layer):
            mixed = shared_scores(scores(leader), own, row_visual, key_visual, mode)
            error = np.sum((output(softmax(mixed)) - expected) ** 2, axis=-1, dtype=np.float64)
            errors[leader, layer] = np.mean(error / power)
    return errors, dropped


def length_keeping(n_from: int, n_to: int, seed: int) -> Array:
    """A random map to fewer dimensions that keeps the lengths of vectors (Johnson-Lindenstrauss).

    The squared length of one vector is off by a factor of about ``1 +- sqrt(2 / n_to)``.

    Returns:
        ``[n_to, n_from]``, or the identity where that wouldn't be fewer.
    """
    if n_from <= n_to:
        return np.eye(n_from, dtype=np.float32)
    return np.random.default_rng(seed).standard_normal((n_to, n_from), dtype=np.float32) / np.float32(n_to**0.5)


def log_softmax(logits: Array) -> Array:
    """Natural logarithm of the softmax over the last dimension."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_divergence(log_p: Array, log_q: Array) -> Array:
    """Kullback-Leibler divergence of q from p over the last dimension, in nats."""
    return np.sum(np.exp(log_p.astype(np.float64)) * (log_p.astype(np.float64) - log_q), -1)
