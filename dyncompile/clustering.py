"""Balanced clusters: groups of one size whose members are alike."""

import itertools
import warnings

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
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
    """For each row a column, with so many rows to each, at the least sum of costs.

    Every row starts where it costs least; then one row after the other goes from a column that has too many to one that
    has too few, by way of others where that is cheaper: a flow of least cost by successive shortest paths (Ahuja,
    Magnanti, Orlin 1993, section 9.7), among so few columns a tenth of the time of an assignment to single places.
    """
    rows, columns = np.arange(len(costs)), np.arange(len(places))
    taken: NDArray[np.intp] = costs.argmin(1)
    count = np.bincount(taken, minlength=len(places))
    while (count > places).any():
        moves = costs - costs[rows, taken][:, None]
        step = np.full((len(places), len(places)), np.inf)
        mover = np.zeros(step.shape, dtype=np.intp)
        for column in np.unique(taken):
            members = np.flatnonzero(taken == column)
            mover[column] = members[moves[members].argmin(0)]
            step[column] = moves[mover[column], columns]
        path, before = np.where(count > places, 0.0, np.inf), np.full(len(places), -1)
        for _ in columns:
            through = path[:, None] + step
            nearer = through.min(0) < path - 1e-12
            before = np.where(nearer, through.argmin(0), before)
            path = np.where(nearer, through.min(0), path)
        end = int(np.where(count < places, path, np.inf).argmin())
        count[end] += 1
        while before[end] >= 0:
            taken[mover[before[end], end]], end = end, int(before[end])
        count[end] -= 1
    return taken


def even_split(count: int, groups: int) -> list[list[int]]:
    """`[0, count)` in consecutive groups whose sizes differ by one at most."""
    edges = [count * g // groups for g in range(groups + 1)]
    return [list(range(start, stop)) for start, stop in itertools.pairwise(edges)]
