"""Which process takes which samples of a step."""

from __future__ import annotations

import heapq

import numpy as np


def shares(lengths: np.ndarray, world_size: int) -> np.ndarray:
    """The process, 0 to world_size - 1, that takes each sample, [n] int64: about as many tokens for each.

    A function of the lengths alone. The longest samples go first, each to the process with the least so far (Graham
    1969, SIAM J. Appl. Math. 17(2): at most 4/3 of the best possible). Fewer samples than processes leave some without.
    """
    taken = np.empty(len(lengths), np.int64)
    loads = [(0, rank) for rank in range(world_size)]
    for place in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        load, rank = loads[0]
        taken[place] = rank
        heapq.heapreplace(loads, (load + int(lengths[place]), rank))
    return taken
