"""Which layers become lazy or lose their attention: the paper's rule, and dynamic programming. Pure functions of measured tables."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ..lazy_layers import dropped_of, lazy_of, leaders_of

GAIN = 0.01  # share by which a step must lower the loss: smaller gains are chance, and there is no end of them
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


def by_cost(cost: Array, drop_cost: Array | None = None) -> dict[tuple[int, int], list[int]]:
    """Plans with the least summed cost, one for every number of lazy and of dropped layers.

    Dynamic programming from the first layer to the last, over the leader in force: O(n_layer^3), with dropped layers O(n_layer^4).

    Args:
        cost: ``[n_layer, n_layer]``, not negative; ``cost[j, l]`` is what layer l costs when it is lazy with leader j < l.
        drop_cost: ``[n_layer]``, what a layer costs without attention; None: every layer keeps its own.

    Returns:
        ``[n_layer]`` leaders, by number of lazy and number of dropped layers; numbers that no plan has are missing.
    """
    n_layer = len(cost)
    n_drop = 0 if drop_cost is None else n_layer
    drops = np.zeros(n_layer) if drop_cost is None else drop_cost
    # best[j, n, m]: layers up to the current one, leader j in force (the last row: none yet), n of them lazy and m dropped
    best = np.full((n_layer + 1, n_layer + 1, n_drop + 1), np.inf)
    best[-1, 0, 0] = 0.0
    # by layer: whether layers behind leader j are lazy or dropped, and where the leader before the layer comes from if it is full
    was_dropped: list[npt.NDArray[np.bool_]] = []
    came_from: list[npt.NDArray[np.int32]] = []
    for layer in range(n_layer):
        lazy = np.full_like(best, np.inf)
        lazy[:layer, 1:] = best[:layer, :-1] + cost[:layer, layer, None, None]
        dropped = np.full_like(best, np.inf)
        dropped[..., 1:] = best[..., :-1] + drops[layer]
        was_dropped.append(dropped < lazy)
        came_from.append(best.argmin(0).astype(np.int32))
        full = best.min(0)
        best = np.minimum(lazy, dropped)
        best[layer] = full
    return {
        (int(n), int(m)): _traced(int(best[:, n, m].argmin()), int(n), int(m), was_dropped, came_from)
        for n, m in np.argwhere(np.isfinite(best.min(0)))
    }


def _traced(
    leader: int, n: int, m: int, was_dropped: list[npt.NDArray[np.bool_]], came_from: list[npt.NDArray[np.int32]]
) -> list[int]:
    """Walks back through the choices of ``by_cost`` from the leader in force at the end."""
    n_layer = len(was_dropped)
    lazy: list[int] = []
    dropped: list[int] = []
    for layer in reversed(range(n_layer)):
        if leader == layer:
            leader = int(came_from[layer][n, m])
        elif was_dropped[layer][leader, n, m]:
            dropped.append(layer)
            m -= 1
        else:
            lazy.append(layer)
            n -= 1
    return leaders_of(lazy, n_layer, dropped)


def by_descent(
    start: Sequence[int],
    loss: Callable[[Sequence[int], float], float],
    allowed: Callable[[Sequence[int]], bool] = lambda _: True,
    drops: bool = False,
    check: Callable[[Sequence[int], float], float] | None = None,
    most_tried: float = np.inf,
) -> tuple[list[int], float]:
    """Improves a plan by the steps of ``neighbours`` as long as one lowers the loss by a percent or more, and that of the check as well.

    Args:
        start: ``[n_layer]`` leaders to start from.
        loss: The loss of leaders, given the loss to beat; it may stop and return anything that isn't lower.
        allowed: Whether leaders save enough; swaps alone always save the same.
        drops: Whether layers may lose their attention.
        check: As ``loss``, on other samples: hundreds of steps are tried, and the best on a few samples may be so by chance. The
            plan that is found is never worse than the start there.
        most_tried: Plans after which the best so far has to do.

    Returns:
        ``[n_layer]`` leaders that are allowed, and their loss.
    """
    best, best_loss = list(start), loss(start, np.inf)
    checked = np.inf if check is None else check(start, np.inf)
    seen = {tuple(best)}
    improved = True
    while improved:
        improved = False
        for tried in neighbours(best, drops):
            if tuple(tried) in seen or not allowed(tried):
                continue
            if len(seen) > most_tried:
                return best, best_loss
            seen.add(tuple(tried))
            to_beat = (1 - GAIN) * best_loss
            tried_loss = loss(tried, to_beat)
            if tried_loss >= to_beat:
                continue
            if check is not None:
                tried_check = check(tried, checked)
                if tried_check >= checked:
                    continue
                checked = tried_check
            best, best_loss, improved = tried, tried_loss, True
            break
    return best, best_loss


def neighbours(leaders: Sequence[int], drops: bool) -> Iterator[list[int]]:
    """Plans one step away: two layers swap what they are - full, lazy or dropped - or, with ``drops``, a layer that isn't full
    becomes something else. No full layer changes alone: that would only save what nobody asked for.
    """
    n_layer = len(leaders)
    kinds = ["full"] * n_layer
    for layer in lazy_of(leaders):
        kinds[layer] = "lazy"
    for layer in dropped_of(leaders):
        kinds[layer] = "dropped"
    changed = [{a: kinds[b], b: kinds[a]} for a in range(n_layer) for b in range(a + 1, n_layer) if kinds[a] != kinds[b]]
    if drops:
        changed += [{a: kind} for a in range(n_layer) for kind in ("full", "lazy", "dropped") if kinds[a] not in ("full", kind)]
    for change in changed:
        tried = [change.get(layer, kind) for layer, kind in enumerate(kinds)]
        if next((kind for kind in tried if kind != "dropped"), "full") == "full":  # else a lazy layer has no leader
            yield leaders_of(
                [layer for layer, kind in enumerate(tried) if kind == "lazy"], n_layer,
                [layer for layer, kind in enumerate(tried) if kind == "dropped"],
            )  # fmt: skip
