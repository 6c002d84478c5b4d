"""Refits W_o and W_v of a lazy layer by ridge regression; one sample in two is held out: they decide how much to shrink, and whether it helps."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Doubles = npt.NDArray[np.float64]

RIDGES = tuple(10.0**e for e in range(-5, 2))  # tried, times the mean eigenvalue
_TOLERANCE = 1e-5  # of conjugate gradients, relative
_MOST_STEPS = 200


def is_held_out(i: int) -> bool:
    """Whether sample ``i`` is kept from the fit."""
    return i % 2 == 1


class Ridge:
    """Least squares of residuals on inputs, kept as sums, in two parts: samples to fit to, and those held out."""

    def __init__(self, n_in: int, n_out: int) -> None:
        self._gram = np.zeros((2, n_in, n_in))
        self._cross = np.zeros((2, n_in, n_out))
        self._power = np.zeros(2)
        self._n_rows = 0
        self._n_samples = 0

    def add(self, inputs: Array, residuals: Array, weights: Doubles) -> None:
        """Adds a sample's rows: ``[n, n_in]``, ``[n, n_out]``, and how much each counts."""
        scale = np.sqrt(weights)[:, None]
        x, y = inputs * scale, residuals * scale
        part = int(is_held_out(self._n_samples))
        self._gram[part] += x.T @ x
        self._cross[part] += x.T @ y
        self._power[part] += np.sum(y**2)
        self._n_rows += len(x)
        self._n_samples += 1

    def error(self, solution: Doubles | None = None, parts: slice = slice(None)) -> float:
        """Mean squared error with ``residuals = inputs @ solution``; None: with nothing solved."""
        if solution is None:
            return float(self._power[parts].sum()) / self._n_rows
        gram, cross = self._gram[parts].sum(0), self._cross[parts].sum(0)
        return float(self._power[parts].sum() - 2 * np.sum(solution * cross) + np.sum(solution * (gram @ solution))) / self._n_rows

    def solve(self) -> Doubles:
        """``[n_in, n_out]``; zero where nothing lowers the error of the held-out rows."""
        values, vectors = np.linalg.eigh(self._gram[0])
        rotated = vectors.T @ self._cross[0]
        held_out = slice(1, 2)
        best, best_error = np.zeros_like(rotated), self.error(parts=held_out)
        for ridge in RIDGES:
            solution = vectors @ (rotated / (values + ridge * values.mean())[:, None])
            if (error := self.error(solution, held_out)) < best_error:
                best, best_error = solution, error
        return best


class ValueRidge:
    """Least squares of residuals on what a change of W_v adds to them, all heads at once.

    With the attention P_h of head h, directions A ``[n, n_embd]`` of the layer's inputs X and the change ``B_g A`` of W_v of KV
    head g, the output of the layer changes by ``sum_h W_o,h B_g(h) (A X P_h^T)``: linear in all B_g ``[head_dim, n]`` together.
    Sums of the features ``A X P_h^T`` are kept, as in ``Ridge``; conjugate gradients solve the normal equations.
    """

    def __init__(self, w_o: Array, n_head: int, n_head_kv: int, n: int) -> None:
        """Takes W_o ``[n_embd, n_head * head_dim]``, the number of heads, of KV heads and of directions."""
        self._n_head, self._n_head_kv = n_head, n_head_kv
        self._w_o = w_o.astype(np.float64)
        by_head = self._w_o.reshape(len(w_o), n_head, -1)
        self._head_dim = by_head.shape[-1]
        self._outer = (self._w_o.T @ self._w_o).reshape(n_head, self._head_dim, n_head * self._head_dim)
        self._gram = np.zeros((2, n_head * n, n_head * n))
        self._cross = np.zeros((2, n_head_kv, self._head_dim, n))
        self._power = np.zeros(2)
        self._n_samples = 0

    def add(self, features: Array, residuals: Array, weights: Doubles) -> None:
        """Adds a sample's rows: ``[n_rows, n_head, n]``, ``[n_rows, n_embd]``, and how much each counts."""
        scale = np.sqrt(weights)[:, None]
        y = residuals * scale
        f = features * scale[:, :, None]
        part = int(is_held_out(self._n_samples))
        flat = f.reshape(len(f), -1)
        self._gram[part] += flat.T @ flat
        back = (y @ self._w_o).reshape(len(y), self._n_head, self._head_dim)
        cross = np.matmul(back.transpose(1, 2, 0), f.transpose(1, 0, 2))
        self._cross[part] += self._by_key(cross)
        self._power[part] += np.sum(y**2)
        self._n_samples += 1

    def _by_key(self, by_head: Doubles) -> Doubles:
        """Sums over the heads that share a key."""
        return by_head.reshape(self._n_head_kv, -1, *by_head.shape[1:]).sum(1)

    def normal(self, change: Doubles, gram: Doubles) -> Doubles:
        """The normal equations' left side for ``change`` ``[n_head_kv, head_dim, n]``, without a ridge."""
        by_head = np.repeat(change, self._n_head // self._n_head_kv, axis=0)
        n = change.shape[-1]
        moved = np.matmul(by_head, gram.reshape(self._n_head, n, -1))  # [head, head_dim, head' * n]
        moved = moved.reshape(self._n_head * self._head_dim, self._n_head, n).transpose(1, 0, 2)
        return self._by_key(np.matmul(self._outer, moved))

    def error(self, change: Doubles | None = None, parts: slice = slice(None)) -> float:
        """Summed squared error with ``change``; None: with nothing changed."""
        power = float(self._power[parts].sum())
        if change is None:
            return power
        gram, cross = self._gram[parts].sum(0), self._cross[parts].sum(0)
        return power - 2 * float(np.sum(change * cross)) + float(np.sum(change * self.normal(change, gram)))

    def solve_with(self, ridge: float, parts: slice = slice(None), start: Doubles | None = None) -> Doubles:
        """``[n_head_kv, head_dim, n]`` that minimises ``error + ridge * mean eigenvalue * |change|^2``."""
        gram, cross = self._gram[parts].sum(0), self._cross[parts].sum(0)
        n = cross.shape[-1]
        # heads apart the equations are S_h B G_h = C: the eigenvectors of both sides solve them; conjugate gradients do the rest
        outer = self._by_key(np.stack([self._outer[h][:, h * self._head_dim : (h + 1) * self._head_dim] for h in range(self._n_head)]))
        inner = self._by_key(np.stack([gram[h * n : (h + 1) * n, h * n : (h + 1) * n] for h in range(self._n_head)]))
        inner /= self._n_head // self._n_head_kv
        (a, u), (b, v) = np.linalg.eigh(outer), np.linalg.eigh(inner)
        spectrum = a[:, :, None] * b[:, None, :]
        shrink = ridge * spectrum.mean()

        def nearly_solved(right: Doubles) -> Doubles:
            rotated = u.transpose(0, 2, 1) @ right @ v
            return u @ (rotated / (np.maximum(spectrum, 0) + shrink)) @ v.transpose(0, 2, 1)

        def left_side(change: Doubles) -> Doubles:
            return self.normal(change, gram) + shrink * change

        return conjugate_gradients(left_side, cross, nearly_solved, start)

    def solve(self) -> Doubles | None:
        """``[n_head_kv, head_dim, n]``; None where nothing lowers the error of the held-out rows."""
        held_out = slice(1, 2)
        best, best_error = None, self.error(parts=held_out)
        change = None
        for ridge in reversed(RIDGES):
            change = self.solve_with(ridge, slice(0, 1), change)
            if (error := self.error(change, held_out)) < best_error:
                best, best_error = change, error
        return best


def main_directions(inputs: Sequence[Array], norm: Array, n: int) -> Array:
    """The directions along which a layer's inputs vary most, nearly: one step of subspace iteration from random ones.

    Args:
        inputs: Parts of the residual stream before the layer, ``[n_rows, n_embd]``.
        norm: Weight of the layer's norm, ``[n_embd]``.
        n: How many.

    Returns:
        ``[n, n_embd]``, orthonormal; every direction, ``[n_embd, n_embd]``, where there aren't more.
    """
    n_embd = len(norm)
    if n >= n_embd:
        return np.eye(n_embd, dtype=np.float32)
    random = np.random.default_rng(0).standard_normal((n_embd, n), dtype=np.float32)
    found = np.zeros_like(random)
    for stream in inputs:
        x = stream / np.maximum(np.linalg.norm(stream, axis=-1, keepdims=True), np.finfo(np.float32).tiny) * norm
        found += x.T @ (x @ random)
    return np.ascontiguousarray(np.linalg.qr(found)[0].T)


def conjugate_gradients(
    matrix: Callable[[Doubles], Doubles], right: Doubles, preconditioner: Callable[[Doubles], Doubles], start: Doubles | None = None
) -> Doubles:
    """Solves ``matrix(x) = right`` for a symmetric positive definite ``matrix``."""
    x = preconditioner(right) if start is None else start
    left = right - matrix(x)
    enough = _TOLERANCE * np.linalg.norm(right)
    step = z = preconditioner(left)
    rho = np.sum(left * z)
    for _ in range(_MOST_STEPS):
        if np.linalg.norm(left) <= enough:
            break
        moved = matrix(step)
        alpha = rho / np.sum(step * moved)
        x = x + alpha * step
        left = left - alpha * moved
        z = preconditioner(left)
        rho, before = np.sum(left * z), rho
        step = z + rho / before * step
    return x
