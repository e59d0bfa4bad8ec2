"""Balanced clusters: groups of one size whose members are alike."""

import itertools
import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.optimize import linprog
from scipy.sparse import coo_array
from scipy.spatial.distance import cdist
from torch import Tensor

_SEED = 0
_ITERATIONS = 20


def balanced_clusters(rows: Tensor, groups: int) -> list[list[int]]:
    """Split rows into groups of equal size, as near to their group's centre as that allows.

    k-means finds the centres, whatever the sizes of its clusters; then each row is given to a centre, all at once and
    at the least sum of squared distances, with `H / groups` places at each (MoEfication, arXiv 2110.01786). The same
    rows give the same groups.

    Args:
        rows: `[H, D]`.
        groups: How many, at most H. Where they do not divide H, sizes differ by one.

    Returns:
        For each group its rows, ascending; groups ordered by their first row.
    """
    points = rows.detach().double().cpu().numpy()
    with warnings.catch_warnings():
        # A cluster may come out empty; every group is filled below.
        warnings.simplefilter("ignore", UserWarning)
        centres, _ = kmeans2(points, groups, iter=_ITERATIONS, minit="++", seed=_SEED)
    sizes = np.bincount(np.arange(len(points)) % groups)
    taken = _shared_out(cdist(points, centres, "sqeuclidean"), sizes)
    return sorted(np.flatnonzero(taken == g).tolist() for g in range(groups))


def _shared_out(costs: NDArray[np.float64], places: NDArray[np.intp]) -> NDArray[np.intp]:
    """For each row a column, with so many rows to each, at the least sum of costs: a transport problem."""
    rows, columns = costs.shape
    cell = np.arange(costs.size)
    ends = np.concatenate([cell // columns, rows + cell % columns])
    taken = coo_array((np.ones(2 * costs.size), (ends, np.tile(cell, 2))), shape=(rows + columns, costs.size)).tocsr()
    found = linprog(costs.ravel(), A_eq=taken, b_eq=np.concatenate([np.ones(rows), places]), method="highs-ds")
    return found.x.reshape(costs.shape).argmax(1)  # type: ignore[no-any-return]


def even_split(count: int, groups: int) -> list[list[int]]:
    """`[0, count)` in consecutive groups whose sizes differ by one at most."""
    edges = [count * g // groups for g in range(groups + 1)]
    return [list(range(start, stop)) for start, stop in itertools.pairwise(edges)]
