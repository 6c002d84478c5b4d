"""Which layers become lazy: the paper's rule, and dynamic programming over Lazy Blocks. Pure functions of measured tables."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..lazy_layers import leaders_of

Array = npt.NDArray[np.float64]


def by_threshold(divergence: Sequence[float], threshold: float) -> list[int]:
    """The paper's Lazy Blocks (arXiv 2602.01901): a layer is lazy when it diverges less than a threshold from the one before.

    Args:
        divergence: ``[n_layer]``, layer l against l - 1; that of layer 0 doesn't count.
        threshold: In the unit of the divergence.

    Returns:
        ``[n_layer]`` leaders.
    """
    return leaders_of([layer for layer in range(1, len(divergence)) if divergence[layer] < threshold], len(divergence))


def by_divergence(divergence: Sequence[float], n_lazy: int) -> list[int]:
    """``by_threshold`` with the threshold raised until ``n_lazy`` layers are below it; the shallower layer stays full on ties.

    Returns:
        ``[n_layer]`` leaders.
    """
    order = sorted(range(1, len(divergence)), key=lambda layer: (divergence[layer], -layer))
    return leaders_of(order[:n_lazy], len(divergence))


def by_cost(cost: Array, n_lazy: int) -> list[int]:
    """Lazy Blocks with the least summed cost, at least ``n_lazy`` lazy layers among them.

    Dynamic programming over the first layer of each block: O(n_layer^3).

    Args:
        cost: ``[n_layer, n_layer]``, not negative; ``cost[j, l]`` is what layer l costs when it is lazy with leader j < l.
        n_lazy: Least number of lazy layers, at most ``n_layer - 1``.

    Returns:
        ``[n_layer]`` leaders; of plans that cost the same, the one with the fewest lazy layers.
    """
    n_layer = len(cost)
    block_cost = np.cumsum(np.triu(cost, 1), axis=1)  # [j, last]: a block of layers j to last
    # best[end, n]: layers 0 to end - 1 in blocks, n of them lazy; start[end, n]: where the last of the blocks begins
    best = np.full((n_layer + 1, n_layer), np.inf)
    start = np.zeros((n_layer + 1, n_layer), dtype=int)
    best[0, 0] = 0.0
    for end in range(1, n_layer + 1):
        for first in range(end):
            lazy = end - first - 1
            total = best[first, : n_layer - lazy] + block_cost[first, end - 1]
            better = total < best[end, lazy:]
            best[end, lazy:][better] = total[better]
            start[end, lazy:][better] = first
    n = n_lazy + int(np.argmin(best[n_layer, n_lazy:]))
    leaders: list[int] = []
    end = n_layer
    while end > 0:
        first = int(start[end, n])
        leaders[:0] = [first] * (end - first)
        n -= end - first - 1
        end = first
    return leaders


def by_descent(start: Sequence[int], loss: Callable[[Sequence[int], float], float]) -> tuple[list[int], float]:
    """Improves a plan by swapping a lazy layer with a full one as long as that lowers the loss; layer 0 stays full.

    Args:
        start: ``[n_layer]`` leaders to start from.
        loss: The loss of leaders, given the loss to beat; it may stop and return anything that isn't lower.

    Returns:
        ``[n_layer]`` leaders with as many lazy layers, and their loss.
    """
    n_layer = len(start)
    best, best_loss = list(start), loss(start, np.inf)
    seen = {tuple(best)}
    improved = True
    while improved:
        improved = False
        for full in range(1, n_layer):
            for lazy in range(1, n_layer):
                if best[full] != full or best[lazy] == lazy:
                    continue
                layers = {layer for layer in range(n_layer) if best[layer] != layer} - {lazy} | {full}
                tried = leaders_of(layers, n_layer)
                if tuple(tried) in seen:
                    continue
                seen.add(tuple(tried))
                tried_loss = loss(tried, best_loss)
                if tried_loss < best_loss:
                    best, best_loss, improved = tried, tried_loss, True
    return best, best_loss
